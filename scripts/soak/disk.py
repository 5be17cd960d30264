"""A disk that is full while a run saves: a small tmpfs, or, without the right to mount one, a limit
on the size of files. The run says what it could not write; with space again it ends as its twin."""

from __future__ import annotations

import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soak import checks
from soak.cells import Cell
from soak.damage import KEPT, Base, overrides
from soak.folder import Folder
from soak.kill import Bench, Unexpected, commit, finish, launch

# Of the most that an undisturbed run's folder holds at once.
SHARES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
REASONS = ("No space left on device", "File too large")


def size_of(folder: Path) -> int:
    """Bytes on a disk of 4096-byte blocks."""
    paths = list(folder.rglob("*"))
    return sum(-(-path.stat().st_size // 4096) * 4096 if path.is_file() else 0 for path in paths)


class Tmpfs:
    """A file system of its own in memory, of so many bytes."""

    reason = REASONS[0]

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        folder.mkdir(parents=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "soak", str(folder)],
            check=True,
            capture_output=True,
        )

    def grow(self) -> None:
        command = ["mount", "-o", "remount,size=64m", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True, capture_output=True)


class FileLimit:
    """No file grows past so many bytes, in this process and those it starts."""

    reason = REASONS[1]

    def __init__(self, folder: Path, size: int):
        folder.mkdir(parents=True)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def grow(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def close(self) -> None:
        self.grow()


@contextmanager
def small_disk(folder: Path, share: float, base: Base) -> Iterator[Tmpfs | FileLimit]:
    """A disk that holds that share of a run; a limit on files where mounting is refused."""
    whole = size_of(base.run)
    try:
        disk = Tmpfs(folder, int(share * whole))
    except (subprocess.CalledProcessError, FileNotFoundError):
        shutil.rmtree(folder)
        largest = max(p.stat().st_size for p in (base.run / "checkpoints").glob("*/*"))
        disk = FileLimit(folder, int(share * largest))
    try:
        yield disk
    finally:
        disk.close()


def key_of(share: float, cell: Cell, seed: int) -> str:
    return f"disk/{share}/{cell.key}/{seed}"


def run_case(share: float, base: Base, bench: Bench, folder: Path) -> dict:
    """From scratch on a small disk until it fails; then with space, to the end."""
    began = time.monotonic()
    problems, row = [], {"stage": base.cell.stage, "share": share, "failed_at": None, "said": ""}
    with small_disk(folder / "disk", share, base) as disk:
        run = Folder(folder / "disk" / "run")
        before = run.state()
        job = launch(base.cell, overrides(base.cell), bench, run.path, "full", folder / "logs")
        try:
            finish(job)
            row["ended"] = "finished"
        except Unexpected:
            row["ended"] = f"exit codes {job.codes()}"
            text = "\n".join(log.read_text(errors="replace") for log in job.logs)
            lines = [line for line in text.splitlines() if disk.reason in line]
            row["said"] = next((line for line in lines if "llmtrain: error" in line), "")
            if not row["said"]:
                problems.append(f"no message names the full disk, only: {lines[:2]}")
        now = run.state()
        row["failed_at"] = now.last
        problems += checks.after_kill(before, now, KEPT)
        disk.grow()
        try:
            finish(
                launch(base.cell, overrides(base.cell), bench, run.path, "more", folder / "logs")
            )
            problems += checks.resumed_right(now, run.state())
            problems += checks.finished_differences(run.path, base.twin, base.steps)
        except Unexpected as error:
            problems.append(f"with space again: {error}")
        means = type(disk).__name__
    return row | {
        "key": key_of(share, base.cell, bench.seed),
        "name": f"disk full at {share:.0%} of a run ({means})",
        "file": "the disk",
        "kind": means,
        "commit": commit(),
        "problems": problems,
        "equal": not problems,
        "seconds": round(time.monotonic() - began, 1),
    }
