"""One job at a time works in a run folder.

Rank 0 holds <run_dir>/.lock from before anything is read or moved there until the run ends. Two
things say that it is held:

    the kernel's lock on the file (fcntl), which goes with the process however that ends, and which
    most network file systems share between machines
    its content: host, process, job and since when, with a sign of life every HEARTBEAT seconds,
    for file systems that keep such locks to one machine

A process of this machine holds the folder exactly as long as the kernel says so. A lock of another
machine counts while signs of life come; when STALE_BEATS of them are missing it is taken over with
a warning. The same batch job, started again by the scheduler, takes over from itself at once. Ages
are differences of times that the file system gave, so that clocks of machines may differ.

A process that finds its lock taken over (it was suspended for minutes) ends at once: two that
write into one folder would destroy it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from llmtrain.distributed import World, broadcast_object
from llmtrain.exits import FAILURE
from llmtrain.train.processes import ENDED, Identity, state_of

log = logging.getLogger(__name__)

NAME = ".lock"
HEARTBEAT = 30.0  # seconds between signs of life
STALE_BEATS = 3  # without a sign of life, then the lock of another machine is taken over
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """A context: rank 0 has the folder for itself, or every rank raises ValueError."""

    def __init__(self, run_dir: Path, world: World, *, heartbeat: float = HEARTBEAT):
        self.run_dir, self.world = run_dir, world
        self.heartbeat, self.stale = heartbeat, STALE_BEATS * heartbeat
        self.path = run_dir / NAME
        self.own = {
            **Identity.own(world.rank).as_dict(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
        self.descriptor: int | None = None
        self.ended = threading.Event()

    def __enter__(self) -> RunLock:
        failure = None
        if self.world.rank == 0:
            try:
                self.acquire()
            except (ValueError, OSError) as error:
                failure = f"run_dir: {error}" if isinstance(error, OSError) else str(error)
        failure = broadcast_object(failure, self.world)
        if failure:
            raise ValueError(failure)
        return self

    def acquire(self) -> None:
        """Take the lock. ValueError, naming the holder, when a living process has it."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self.take_kernels()
            self.check_content()
        except BaseException:
            if not self.is_own(self.read()):  # closing would release what this process has already
                os.close(self.descriptor)
            self.descriptor = None
            raise
        self.write(self.own)
        self.thread = threading.Thread(target=self.beat, name="run-lock", daemon=True)
        self.thread.start()

    def take_kernels(self) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.by_kernel = True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(self.refusal(self.read())) from None
            if error.errno not in UNSUPPORTED:
                raise
            self.by_kernel = False
            log.warning("%s: the file system has no locks (%s)", self.path, error.strerror)

    def check_content(self) -> None:
        """Whether the process that the content names has ended, is silent, or lives."""
        holder = self.read()
        if not holder:
            return
        if holder["boot"] == self.own["boot"]:
            if self.is_own(holder) or (not self.by_kernel and self.lives(holder)):
                raise ValueError(self.refusal(holder))
            return
        same_job = holder["job"] is not None and holder["job"] == self.own["job"]
        if same_job and holder["restarts"] < self.own["restarts"]:
            log.warning("%s: taken over from %s, before this job restarted", *self.named(holder))
            return
        self.wait_for_silence(holder)
        log.warning(
            "%s: taken over from %s, which gave no sign of life for %.0f s; if it runs after all, "
            "it ends as soon as it notices",
            *self.named(holder),
            self.stale,
        )

    def is_own(self, holder: dict | None) -> bool:
        """Whether the content names this very process; numbers alone are given again."""
        keys = ("boot", "pid", "started")
        return holder is not None and all(holder[key] == self.own[key] for key in keys)

    def lives(self, holder: dict) -> bool:
        return state_of(holder["pid"], holder["started"]) != ENDED

    def wait_for_silence(self, holder: dict) -> None:
        """Watch another machine's lock until it is stale. ValueError at a sign of life."""
        last = self.changed()
        age = self.now() - last
        if age < self.stale:
            log.warning(
                "%s: held by %s, last sign of life %.0f s ago; waiting for the next one, or until "
                "there was none for %.0f s",
                *self.named(holder),
                age,
                self.stale,
            )
        while self.now() - last < self.stale:
            time.sleep(self.heartbeat / 30)
            if self.changed() != last:
                raise ValueError(self.refusal(self.read() or holder))

    def changed(self) -> float:
        return os.stat(self.path).st_mtime

    def now(self) -> float:
        """The file system's time."""
        probe = self.path.with_name(f"{NAME}-{self.own['host']}-{os.getpid()}")
        probe.touch()
        seen = probe.stat().st_mtime
        probe.unlink()
        return seen

    def read(self) -> dict | None:
        """The content; None when nobody is named, or a name was cut off."""
        try:
            return json.loads(os.pread(self.descriptor, 1 << 16, 0)) or None
        except json.JSONDecodeError:
            return None

    def write(self, content: dict) -> None:
        # Not by rename: the kernel's lock belongs to this very file, and to this descriptor (any
        # other one of this process would release it when closed).
        data = json.dumps(content).encode()
        os.pwrite(self.descriptor, data, 0)
        os.ftruncate(self.descriptor, len(data))

    def beat(self) -> None:
        """A sign of life at intervals; ends the process when another one has the folder."""
        while not self.ended.wait(self.heartbeat):
            try:
                holder = self.read()
                if holder and not self.is_own(holder):
                    self.lost(holder)
                self.write(self.own | {"alive": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
            except OSError as error:
                log.error("%s: no sign of life could be written: %s", self.path, error)

    def lost(self, holder: dict) -> None:
        print(
            f"llmtrain: {self.path} was taken over by {describe(holder)} while this process "
            "(suspended, or cut off from the file system) gave no sign of life; it ends here and "
            "writes nothing more",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILURE)

    def named(self, holder: dict) -> tuple[Path, str]:
        return self.path, describe(holder)

    def refusal(self, holder: dict | None) -> str:
        held = describe(holder) if holder else "a process that has not written its name yet"
        stop = "that one"
        if holder:
            job, pid, host = holder["job"], holder["pid"], holder["host"]
            stop = f"it (scancel {job})" if job else f"it (kill {pid} on {host})"
        return (
            f"run_dir: {self.run_dir} is in use by {held}, expected one job a run folder; wait for "
            f"its end, stop {stop}, or give this run another folder with name=... or run_dir=..."
        )

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Name nobody, and let the kernel's lock go."""
        if self.descriptor is None:
            return
        self.ended.set()
        self.thread.join(timeout=5)  # it may be stuck with the file system
        self.write({})
        os.close(self.descriptor)
        self.descriptor = None


def describe(holder: dict) -> str:
    """The holder in the words of a message."""
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"pid {holder['pid']} on host {holder['host']}{job}, since {holder['since']}"
