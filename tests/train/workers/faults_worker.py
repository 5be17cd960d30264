"""Faults of ranks, in whole trainings: faults_worker.py OUT OVERRIDE...

Every call continues OUT/<fault>, a run with that fault. Each rank writes OUT/weights-rank<R>.pt:
its copy of the weights after a run in which one bit was flipped.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from llmtrain.config import compose
from llmtrain.exits import RunFailed
from llmtrain.train.engine import Engine
from llmtrain.train.loop import train

RANK = int(os.environ["RANK"])


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]

    def configure(name: str, *more: str) -> dict:
        return compose("train", [*overrides, f"run_dir={out / name}", *more])

    engines = []
    close = Engine.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda engine: (engines.append(engine), close(engine)))
        with pytest.raises(RunFailed, match="rank"):  # found before the last save
            train(configure("flip", "deepspeed=zero0", "guard.inject=[flip_weight@12:rank1]"))
    weights = {name: p.detach().clone() for name, p in engines[0].module.named_parameters()}
    torch.save(weights, out / f"weights-rank{RANK}.pt")
    began = time.perf_counter()
    train(configure("slow", "guard.inject=[slow@3-12:rank1:x20]"))
    slow = time.perf_counter() - began
    began = time.perf_counter()
    train(configure("fast", "train.save_every=99"))
    (out / f"seconds-rank{RANK}.txt").write_text(f"{slow} {time.perf_counter() - began}")
    train(configure("kill", "guard.inject=[kill@8:rank1]"))


if __name__ == "__main__":
    main()
