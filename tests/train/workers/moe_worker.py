"""A mixture of experts trained on each rank of torchrun, or alone: moe_worker.py OUT OVERRIDE...

OUT/straight, and OUT/resumed from its first checkpoint; OUT/zero3. OUT/loads-rank<R>.json: what
the channel of each layer was handed after every step of straight, in which the last rank's loss is
not finite at step BAD_STEP.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from llmtrain.channels.moe import MoE
from llmtrain.config import compose
from llmtrain.data.batch import MicroBatch
from llmtrain.train.engine import Engine
from llmtrain.train.loop import train

BAD_STEP = 3
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]

    def configure(name: str, *more: str) -> dict:
        return compose("train", [*overrides, f"run_dir={out / name}", *more])

    loads: list[list[float]] = []
    after_step, accumulate, update = MoE.after_step, Engine.accumulate, Engine.update
    steps = [1]

    def recorded(channel: MoE, sums: dict) -> dict:
        loads.append(sums["load"].tolist())
        return after_step(channel, sums)

    def spoiled(engine: Engine, micro: MicroBatch, *, last: bool, **more: object) -> None:
        if steps[0] == BAD_STEP and RANK == SIZE - 1 and last:
            weights_BT = micro.weights_BT.clone()
            weights_BT[0, 0] = float("inf")
            micro = dataclasses.replace(micro, weights_BT=weights_BT)
        accumulate(engine, micro, last=last, **more)

    def counted(engine: Engine, *arguments: object, **more: object) -> object:
        steps[0] += 1
        return update(engine, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "after_step", recorded)
        patch.setattr(Engine, "accumulate", spoiled)
        patch.setattr(Engine, "update", counted)
        train(configure("straight"))
    (out / f"loads-rank{RANK}.json").write_text(json.dumps(loads))
    first = out / "straight" / "checkpoints" / "step-00000005"
    train(configure("resumed", f"train.resume={first}"))
    train(configure("zero3", "deepspeed=zero3"))


if __name__ == "__main__":
    main()
