"""A training that kills its process in the middle of a save: kill_worker.py STEP OVERRIDE...

On several ranks the last one dies.
"""

from __future__ import annotations

import os
import signal
import sys

from llmtrain.config import compose
from llmtrain.train import checkpoint
from llmtrain.train.loop import train


def main() -> None:
    step, overrides = int(sys.argv[1]), sys.argv[2:]
    rank, size = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    write_all, write_file = checkpoint.write_all, checkpoint.write_file

    def write_half(descriptor: int, data: memoryview) -> None:
        write_all(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path, *arguments, **options) -> dict:
        if rank == size - 1 and path.parent.name == f".tmp-step-{step:08d}":
            checkpoint.write_all = write_half
        return write_file(path, *arguments, **options)

    checkpoint.write_file = write
    train(compose("train", overrides))


if __name__ == "__main__":
    main()
