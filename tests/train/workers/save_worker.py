"""Saves on the ranks of torchrun: save_worker.py OUT OVERRIDE...

Continues OUT/killed, and runs OUT/slow, where the last rank does not write its first file before
step 8 was made: OUT/slow.txt has the checkpoints that there were after step 7.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmtrain import checkpoint as reading
from llmtrain.config import compose
from llmtrain.train import checkpoint, loop

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    loop.train(compose("train", [*overrides, f"run_dir={out / 'killed'}"]))

    write_file, one_step = checkpoint.write_file, loop.Run.one_step
    reached: dict[str, int] = {}

    def write_slowly(path, *arguments, **options) -> dict:
        if path.parent.name == ".tmp-step-00000005" and RANK == SIZE - 1:
            while reached.get("step", 0) < 8:  # further steps need all ranks' collectives
                time.sleep(0.01)
        return write_file(path, *arguments, **options)

    def note_step(run, batches) -> None:
        one_step(run, batches)
        reached["step"] = run.step
        if RANK == 0 and run.step == 7:
            found = reading.list_checkpoints(out / "slow")
            (out / "slow.txt").write_text(str(found))

    checkpoint.write_file, loop.Run.one_step = write_slowly, note_step
    loop.train(compose("train", [*overrides, f"run_dir={out / 'slow'}"]))


if __name__ == "__main__":
    main()
