"""Which process a rank is, and what the kernel says about processes of this machine."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of a running kernel; containers share it

# Third field of /proc/<pid>/stat -> what it means for someone who waits for that process.
STATES = {
    "T": "stopped by a signal (SIGSTOP, Ctrl-Z); SIGCONT lets it go on",
    "t": "stopped by a debugger",
    "D": "in the kernel, waiting for a disk, a network file system or a driver",
    "Z": "ended",
    "X": "ended",
}
ENDED = STATES["Z"]
ALIVE = "alive"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A rank's process. boot: the kernel it runs under; started: in that kernel's clock ticks, so
    that a later process with the same number is another one."""

    rank: int
    host: str
    pid: int
    job: str | None
    boot: str
    started: int | None

    @classmethod
    def own(cls, rank: int = 0) -> Identity:
        return cls(
            rank=rank,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            boot=BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname(),
            started=start_ticks(os.getpid()),
        )

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def as_dict(self) -> dict:
        return asdict(self)


def stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name; None when there is no process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None when there is none."""
    fields = stat_fields(pid)
    return None if fields is None else int(fields[19])


def state_of(pid: int, started: int | None) -> str:
    """What a process of this machine does: alive, ended, or why it does nothing."""
    fields = stat_fields(pid)
    if fields is None or (started is not None and int(fields[19]) != started):
        return ENDED
    return STATES.get(fields[0], ALIVE)
