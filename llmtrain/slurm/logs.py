"""`llmtrain logs`: the logs of the ranks, merged by the time at the beginning of each line."""

from __future__ import annotations

import heapq
import re
import sys
import time
from calendar import timegm
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ?(.*)")
AGO = re.compile(r"(\d+)([smhd])")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DRIVER = "driver"
# How rank 0 begins the line of an interval (runlog.py).
INTERVAL = re.compile(r"(?:train|val) (\d+)/")
POLL = 0.5


@dataclass
class LogFile:
    """A log that grows. who: the rank, or the driver."""

    path: Path
    who: str
    position: int = 0
    stamp: str = ""
    rest: str = field(default="", repr=False)

    def new_lines(self) -> Iterator[tuple[str, str, str]]:
        """(time, who, text) of the whole lines that were added since the last call."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                self.position = file.tell()
                match = STAMP.fullmatch(line.rstrip("\n"))
                if match:
                    self.stamp, text = match.groups()
                else:
                    text = line.rstrip("\n")
                yield self.stamp, self.who, text


def show_logs(config: dict, out: TextIO = sys.stdout) -> None:
    """Print what is asked for; with follow until interrupted."""
    folder = Path(config["run_dir"]) / "logs"
    since = "" if config["since"] is None else begin(config["since"], time.time())
    if config["step"] is not None:
        since = max(since, time_of_step(folder, config["step"]))
    files: dict[Path, LogFile] = {}
    open_new(folder, config["rank"], files)
    if not files:
        raise ValueError(
            f"run_dir: {folder} holds no logs{of_ranks(config['rank'])}, expected rank-*.log; they "
            "are written by runs of `llmtrain launch` (others have run.log); check run_dir and rank"
        )
    lines = merged(files, since)
    for line in lines if config["tail"] is None else deque(lines, maxlen=config["tail"]):
        print(line, file=out)
    while config["follow"]:
        out.flush()
        time.sleep(POLL)
        open_new(folder, config["rank"], files)
        for line in merged(files, since):
            print(line, file=out)


def open_new(folder: Path, rank: int | list[int] | None, files: dict[Path, LogFile]) -> None:
    """Add the logs that are wanted and not open yet: ranks may come later."""
    wanted = None if rank is None else {rank} if isinstance(rank, int) else set(rank)
    for path in sorted(folder.glob("*.log")):
        if path in files:
            continue
        if path.stem == DRIVER and wanted is None:
            files[path] = LogFile(path, DRIVER)
        elif match := re.fullmatch(r"rank-(\d+)", path.stem):
            number = int(match.group(1))
            if wanted is None or number in wanted:
                files[path] = LogFile(path, str(number))


def merged(files: dict[Path, LogFile], since: str) -> Iterator[str]:
    """The new lines of all logs, by time."""
    several = len(files) > 1
    streams = [file.new_lines() for file in files.values()]
    for stamp, who, text in heapq.merge(*streams, key=lambda line: line[0]):
        if stamp >= since:
            yield f"{stamp} {who:>6} {text}" if several else f"{stamp} {text}"


def of_ranks(rank: int | list[int] | None) -> str:
    return "" if rank is None else f" of rank {rank}"


def begin(since: str, now: float) -> str:
    """ "10m" (ago) or a time, as the stamps of the logs are written. ValueError for others."""
    if match := AGO.fullmatch(since):
        then = now - int(match.group(1)) * UNITS[match.group(2)]
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(then))
    for pattern in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            then = timegm(time.strptime(since.rstrip("Z"), pattern))
        except ValueError:
            continue
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(then))
    raise ValueError(
        f"since: got {since!r}, expected a time ago (90s, 10m, 2h, 1d) or a time in UTC; write "
        'since=10m or since="2026-11-23T13:05"'
    )


def time_of_step(folder: Path, step: int) -> str:
    """When rank 0 last reached a step (a run may repeat some after a restart)."""
    file = folder / "rank-00000.log"
    found, last = None, 0
    for stamp, _, text in LogFile(file, "0").new_lines() if file.exists() else ():
        if match := INTERVAL.match(text):
            reached = int(match.group(1))
            if reached < last and reached < step:
                found = None  # it went back to before the step
            if found is None and reached >= step:
                found = stamp
            last = reached
    if found is None:
        raise ValueError(
            f"step: no log line of rank 0 reports step {step} or later, the last is {last}; "
            "choose an earlier one"
        )
    return found
