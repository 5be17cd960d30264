"""Whole trainings on the ranks of torchrun: loop_worker.py OUT OVERRIDE...

OUT/straight-<stage>, OUT/broken-<stage>: run folders, the second stopped by a signal to the last
rank alone and continued; OUT/failed-rank<R>.txt: what each rank said when rank 1 could not write.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

from llmtrain.config import compose
from llmtrain.exits import RunFailed
from llmtrain.train.loop import train

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def signal_at(run_dir: Path, step: int) -> None:
    ledger = run_dir / "ledger.jsonl"
    while not ledger.exists() or len(ledger.read_text().splitlines()) < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]

    def configure(name: str, stage: str) -> dict:
        return compose("train", [*overrides, f"run_dir={out / name}", f"deepspeed={stage}"])

    for stage in ("zero1", "zero3"):
        train(configure(f"straight-{stage}", stage))
        config = configure(f"broken-{stage}", stage)
        if RANK == SIZE - 1:
            thread = threading.Thread(target=signal_at, args=(out / f"broken-{stage}", 3))
            thread.start()
        stopped = train(config)
        if RANK == SIZE - 1:
            thread.join()
        assert not stopped["finished"]
        assert train(config)["finished"]

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sync = os.fsync
    if RANK == 1:
        os.fsync = no_space
    config = configure("failed", "zero2")
    config["train"]["save_failures"] = 2
    try:
        train(config)
    except RunFailed as error:
        (out / f"failed-rank{RANK}.txt").write_text(str(error))
    os.fsync = sync


if __name__ == "__main__":
    main()
