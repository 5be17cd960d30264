"""Whole guarded trainings on the ranks of torchrun: guard_worker.py OUT OVERRIDE...

OUT/guarded-<stage>: a run with faults; OUT/lacking-<stage>: as many applied steps on a data order
that never contained what was skipped or passed over.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lacking import lacking

from llmtrain.config import compose
from llmtrain.data.loader import TokenLoader
from llmtrain.train.loop import train

ROWS, STEPS, LACKING = 8, 12, [2, 6, 8, 9]


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    faults = [entry for entry in overrides if entry.startswith("guard.inject")]
    plain = [entry for entry in overrides if entry not in faults]

    def configure(name: str, *more: str) -> dict:
        fixed = [*plain, "train.val_every=99", f"run_dir={out / name}"]
        return compose("train", [*fixed, *more])

    for stage in ("zero0", "zero2", "zero3"):
        chosen = f"deepspeed={stage}"
        train(configure(f"guarded-{stage}", chosen, *faults))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TokenLoader, "batch", lacking(LACKING, ROWS))
            tokens = f"train.total_tokens={(STEPS - 2) * 256}"
            train(configure(f"lacking-{stage}", chosen, tokens))


if __name__ == "__main__":
    main()
