"""Which checkpoints stay: the newest `keep` good ones, and those at every `keep_every` steps.

Of a course that was left (step-N.superseded-1) one stays until the new course has `keep` good ones
from step N on: when one of the new course at that step would go, `keep_every` aside.

What was written, or read and found good, by this process is good as long as its files are the same
(size, inode, time of change); anything else is read once before an older one goes in its favour.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from pathlib import Path

from llmtrain.checkpoint import list_checkpoints, problems

log = logging.getLogger(__name__)

SUPERSEDED = re.compile(r"step-(\d{8,})\.superseded-\d+")
Signature = dict[str, tuple[int, int, int]]


class Retention:
    """Used by rank 0 alone."""

    def __init__(self, run_dir: Path, *, keep: int, keep_every: int | None):
        self.run_dir, self.keep, self.keep_every = run_dir, keep, keep_every
        self.known: dict[Path, Signature] = {}
        # What the run would go back to if steps from this one on had to be undone stays too.
        self.suspect: int | None = None

    def written(self, path: Path) -> None:
        """A checkpoint is durable, and good."""
        self.known[path] = signature(path)

    def is_good(self, path: Path) -> bool:
        now = signature(path)
        if self.known.get(path) == now:
            return True
        found = problems(path)
        if found:
            log.warning(
                "%s is damaged and does not count as kept: %s; `llmtrain checkpoint verify` "
                "checks all",
                path,
                "; ".join(found),
            )
            return False
        self.known[path] = now
        return True

    def apply(self, step: int) -> None:
        """Delete what is older than the `keep` newest good ones up to a step, written or read.

        Nothing goes, and nothing is read, while there are not more. A failure to delete is told,
        and tried again next time.
        """
        good, suspect = 0, self.suspect
        sound = suspect is None  # one from before the suspected steps is kept
        # later ones are of a course that was left
        found = [(at, path) for at, path in list_checkpoints(self.run_dir) if at <= step]
        left = list_superseded(self.run_dir)
        if len(found) + bool(left) <= self.keep:
            return
        for at, path in reversed(found):
            before = suspect is None or at < suspect
            if good < self.keep or (before and not sound):
                is_good = self.is_good(path)
                good += is_good
                sound |= is_good and before
                if is_good and good == self.keep:
                    for path in [path for passed, path in left if passed <= at]:
                        self.delete(path)
            elif not self.keep_every or at % self.keep_every:
                self.delete(path)

    def delete(self, path: Path) -> None:
        self.known.pop(path, None)
        # Under a name that no reader takes for a checkpoint, however far the deletion comes.
        doomed = path.with_name(f".tmp-old-{path.name}")
        try:
            path.rename(doomed)
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)


def list_superseded(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints that were set aside."""
    folder = run_dir / "checkpoints"
    found = []
    for path in folder.glob("step-*.superseded-*") if folder.is_dir() else ():
        match = SUPERSEDED.fullmatch(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def signature(path: Path) -> Signature:
    """Name -> size, inode and time of change of each file of a checkpoint."""
    found = {}
    with contextlib.suppress(OSError):  # then it differs from any earlier one
        for file in path.iterdir():
            if file.is_file():
                status = file.stat()
                found[file.name] = (status.st_size, status.st_ino, status.st_ctime_ns)
    return found
