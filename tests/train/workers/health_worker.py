"""Trainings of three ranks, one of which drifts apart or is slow: health_worker.py OUT OVERRIDE...

OUT/healthy: a training, compared after every step. OUT/zero<S>: rank BAD_RANK changes one bit of
one weight after step BAD_STEP; OUT/zero<S>-rank<R>.txt: what each rank said. OUT/slow: in the steps
SLOW its forward passes take long, and so does the data of rank STARVED_RANK.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from llmtrain.config import compose
from llmtrain.data.prefetch import Prefetcher
from llmtrain.exits import RunFailed
from llmtrain.train.engine import Engine
from llmtrain.train.loop import train

RANK = int(os.environ["RANK"])
STARVED_RANK = 2
BAD_RANK, BAD_STEP, FLIPPED = 1, 7, "model.stack.blocks.1.channel.down.weight"
SLOW, PAUSE = range(5, 9), 0.8


def flip_at(step: int):
    """Engine.update that changes a bit after that step."""
    update, steps = Engine.update, [0]

    def flipping(engine: Engine, *arguments: object, **more: object) -> object:
        pending = update(engine, *arguments, **more)
        steps[0] += 1
        if steps[0] == step and RANK == BAD_RANK:
            weights = dict(engine.module.named_parameters())[FLIPPED].data.view(-1)
            weights[3:4].view(torch.int32).bitwise_xor_(1)
        return pending

    return flipping


def slow_forward():
    accumulate, calls = Engine.accumulate, [0]

    def slow(engine: Engine, *arguments: object, **more: object) -> None:
        calls[0] += 1
        if calls[0] in SLOW and RANK == BAD_RANK:
            time.sleep(PAUSE)
        accumulate(engine, *arguments, **more)

    return slow


def slow_data():
    prepare = Prefetcher.step

    def slow(batches: Prefetcher, step: int) -> list:
        if step + 1 in SLOW and RANK == STARVED_RANK:
            time.sleep(2 * PAUSE)
        return prepare(batches, step)

    return slow


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]

    def configure(name: str, *more: str) -> dict:
        return compose("train", [*overrides, f"run_dir={out / name}", *more])

    train(configure("healthy", "deepspeed=zero3", "health.compare_every=1"))
    # At stage 3 the copies are renewed from the owner's part in every step.
    for stage, compare_every in (("zero0", 4), ("zero3", BAD_STEP)):
        more = f"deepspeed={stage}", f"health.compare_every={compare_every}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "update", flip_at(BAD_STEP))
            try:
                train(configure(stage, *more))
            except RunFailed as error:
                (out / f"{stage}-rank{RANK}.txt").write_text(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "accumulate", slow_forward())
        patch.setattr(Prefetcher, "step", slow_data())
        train(configure("slow", "health.straggler_factor=2", "health.compare_every=1"))


if __name__ == "__main__":
    main()
