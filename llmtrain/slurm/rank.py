"""One rank under srun: runs the training as a child, keeps its output, and notes how it ended.

    python -m llmtrain.slurm.rank <submission> <start> <config>

Every line goes to <run_dir>/logs/rank-00000.log with the time before it; rank 0's also to the job's
log. A stop on request is no failure to srun, which would kill the ranks that are still saving.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import TextIO

from llmtrain.exits import FINISHED, HUNG, STOPPED
from llmtrain.slurm.submission import Submission

# Slurm signals all processes of a task or only this one, by its configuration: twice does no harm.
PASSED_ON = (signal.SIGTERM, signal.SIGUSR2)
# Seconds that a rank which saw a hang leaves to the others for their reports.
REPORTS = 5
TAIL = 30


def main(arguments: list[str]) -> int:
    submission, start, config = Submission.load(arguments[0]), Path(arguments[1]), arguments[2]
    rank, node = int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
    submission.logs.mkdir(parents=True, exist_ok=True)
    log = (submission.logs / f"rank-{rank:05d}.log").open("a", encoding="utf-8", buffering=1)
    command = [sys.executable, "-m", "llmtrain.cli", "train", "--config", config]
    with log:
        size = os.environ.get("SLURM_STEP_NUM_TASKS", "?")
        job = "job {} start {}".format(*start.name.rsplit("-", 1))
        log.write(f"{stamp()} --- {job}: rank {rank} of {size} on {node}\n")
        code, told, tail = follow(command, log, echo=rank == 0)
        if code < 0 and told and -code in PASSED_ON:  # before the training could take signals
            ended = STOPPED
        else:
            ended = code
        after = f" after {', '.join(signal.Signals(n).name for n in told)}" if told else ""
        log.write(f"{stamp()} --- {job}: rank {rank} ended with {describe(ended)}{after}\n")
    note(start, rank, node, ended, tail)
    if ended == HUNG:
        time.sleep(REPORTS)
    if ended not in (FINISHED, STOPPED) and rank:
        sys.stderr.write(f"rank {rank} on {node}: {describe(ended)}\n" + "".join(tail))
    if ended == STOPPED and code == STOPPED:
        return FINISHED
    return ended if ended >= 0 else 128 - ended


def follow(command: list[str], log: TextIO, *, echo: bool) -> tuple[int, list[int], deque[str]]:
    """Run a command, its output into the log; its exit code (-n: signal n), the signals passed on
    to it, and its last lines."""
    told: list[int] = []
    tail: deque[str] = deque(maxlen=TAIL)
    children: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    children.append(child)
    for number in list(told):  # it came before the child
        child.send_signal(number)

    def copy() -> None:
        for line in child.stdout:
            log.write(f"{stamp()} {line.rstrip(chr(10))}\n")
            tail.append(line)
            if echo:
                sys.stdout.write(line)
                sys.stdout.flush()

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    code = child.wait()
    copying.join(timeout=10)  # a process that the child left behind may hold the pipe
    return code, told, tail


def note(start: Path, rank: int, node: str, code: int, tail: deque[str]) -> None:
    """Tell the batch driver how this rank ended."""
    said = next((line.strip() for line in reversed(tail) if line.strip()), "")
    record = {"rank": rank, "node": node, "code": code, "time": time.time(), "said": said}
    start.mkdir(parents=True, exist_ok=True)
    file = start / f"rank-{rank:05d}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(file)


def describe(code: int) -> str:
    """An exit code as words."""
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def stamp() -> str:
    """Now, in UTC, to the millisecond; such stamps sort as text."""
    now = time.time()
    date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{date}.{int(now * 1000) % 1000:03d}Z"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
