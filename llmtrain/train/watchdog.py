"""A hang ends with a report of which rank and where, not with a silent timeout.

The loop and the engine set a mark at each phase of a step; a thread looks whether marks still
change. The phases of a step, in their order (forward and backward once a micro-batch):

    data           wait for this step's micro-batches
    forward        ... of a micro-batch, with what ZeRO-3 gathers
    backward       ... of a micro-batch, with what ZeRO-2 and 3 sum over ranks on the way
    reduce         gradients and the step's totals are summed over ranks
    update         the optimizer step, and weights gathered again
    read_results   on a GPU: wait for the device to have done the step before
    validate       a batch of held-out rows
    compare        ranks compare their weights
    save           a checkpoint, or the wait for the one before to become durable
    rollback       back to a checkpoint

Before the first step stands `start` (build, restore, first collectives). When no mark was set for
health.hang_seconds (health.first_step_seconds in start, in the first two steps, which compile, in
the first validation, in a save and in a rollback), a rank writes its report into
<run_dir>/hangs/<time of start>. Ranks that look idle watch for that folder and then write theirs,
whatever their own limit. The lowest rank that gave one waits for the others, at most `grace`
seconds, writes verdict.txt (hang_report.py) and prints it; then all end with exit code 86, without
another collective.

A main thread that is blocked in native code and keeps Python's lock starves this thread. For that
case faulthandler waits outside of Python: armed anew at every look, it prints the stacks and ends
the process (exit code 1) half a grace after the limit, before the other ranks' verdict, which
calls such a rank silent. A process that is suspended longer than that (SIGSTOP) and then continued
ends the same way.

A rank of this machine that is gone while another one waits in a collective for ORPHANED seconds
ends that one too (exit code 1): gloo notices at once, NCCL not always.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from llmtrain.distributed import TIMEOUT, World, gather_objects
from llmtrain.exits import FAILURE, HUNG, RunFailed
from llmtrain.train import hang_report
from llmtrain.train.processes import ENDED, Identity, state_of

log = logging.getLogger(__name__)

FOLDER = "hangs"
SLOW_STEPS = 2  # steps of a start that may compile; a GPU's result is read one later
ORPHANED = 30.0  # seconds in a collective without a peer that has ended
SLOW_PHASES = ("start", "save", "rollback")
MOST_GRACE, LEAST_GRACE = 60.0, 5.0
MOST_POLL = 5.0


def collective_timeout(health: dict) -> timedelta:
    """Of the process group: long after the watchdog's limits, which say more."""
    longest = max(health["hang_seconds"] or 0.0, health["first_step_seconds"])
    return max(TIMEOUT, timedelta(seconds=longest + 5 * MOST_GRACE))


class Mark(NamedTuple):
    """Where a rank is: count marks were set before this one, at a time of time.monotonic()."""

    phase: str
    step: int
    count: int
    slow: bool
    time: float


class Watch:
    """The marks of one rank. Setting one costs less than a microsecond: no lock, no file."""

    def __init__(self) -> None:
        self.step = self.count = self.steps = 0
        self.slow = True
        self.lap: Callable[[str], None] = lambda name: None  # a clock's, of the rank's own work
        self.mark = Mark("start", 0, 0, True, time.monotonic())

    def begin_step(self, step: int) -> None:
        """The step that begins now, with its data."""
        self.step, self.steps = step, self.steps + 1
        self.slow = self.steps <= SLOW_STEPS
        self.at("data")

    def at(self, phase: str, *, slow: bool = False) -> None:
        """This rank reaches a phase. slow: it may take as long as a first step."""
        self.count += 1
        self.mark = Mark(phase, self.step, self.count, slow or self.slow, time.monotonic())


def within(seconds: float, action: Callable[[], object]) -> object:
    """What an action gives, or None when it takes longer or fails: files and drivers may hang."""
    result: list[object] = []

    def act() -> None:
        try:
            result.append(action())
        except Exception as error:  # the outer border of a thread
            print(f"llmtrain: watchdog: {action}: {error!r}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=act, name="watchdog-action", daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


class Watchdog:
    """A context within which a hang of any rank ends all of them with a report.

    All ranks enter it together. hang_seconds: None for no limit; grace: how long reports of other
    ranks are waited for.
    """

    def __init__(
        self,
        watch: Watch,
        world: World,
        run_dir: Path,
        *,
        hang_seconds: float | None,
        first_step_seconds: float,
        grace: float | None = None,
    ):
        self.watch, self.world = watch, world
        self.limit, self.slow_limit = hang_seconds, first_step_seconds
        self.identity = Identity.own(world.rank)
        gathered = gather_objects((self.identity, time.strftime("%Y%m%d-%H%M%S")), world)
        self.ranks = [identity for identity, _ in gathered]
        self.folder = run_dir / FOLDER / gathered[0][1]
        shortest = hang_seconds or first_step_seconds
        self.grace = grace or min(MOST_GRACE, max(LEAST_GRACE, shortest / 10))
        self.poll = min(MOST_POLL, shortest / 20, self.grace / 10)
        self.ask_after = min(ORPHANED, shortest / 4)
        self.main_thread = threading.get_ident()
        self.ended = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.limit is not None:
            self.arm(self.limit_of(self.watch.mark))
            self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RunFailed):
            self.name_the_gone(error)
        self.ended.set()
        if self.limit is not None:
            self.thread.join()
            faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        """Look at the mark until the run ends or does not move."""
        while not self.ended.wait(self.poll):
            mark = self.watch.mark
            limit = self.limit_of(mark)
            self.arm(limit)
            idle = time.monotonic() - mark.time
            if idle > limit:
                self.end(f"no progress for {idle:.0f} s", HUNG)
            elif idle > self.ask_after and within(self.grace, self.folder.is_dir):
                self.end("another rank reports a hang", HUNG)
            elif idle > ORPHANED and (gone := self.gone()) and self.waits():
                names = ", ".join(map(str, gone))
                self.end(f"{names} has ended, and this rank waits for it", FAILURE)

    def arm(self, limit: float) -> None:
        """Put off what happens when this thread does not come here any more."""
        faulthandler.dump_traceback_later(limit + self.grace / 2, exit=True, file=2)

    def limit_of(self, mark: Mark) -> float:
        slow = mark.slow or mark.phase in SLOW_PHASES
        return max(self.slow_limit, self.limit) if slow else self.limit

    def gone(self) -> list[Identity]:
        """Ranks of this machine whose process has ended."""
        return [
            rank
            for rank in self.ranks
            if rank.boot == self.identity.boot
            and rank.rank != self.identity.rank
            and state_of(rank.pid, rank.started) == ENDED
        ]

    def waits(self) -> bool:
        frames = hang_report.frames_of(sys._current_frames().get(self.main_thread))
        return hang_report.waiting(frames) is not None

    def name_the_gone(self, error: RuntimeError, patience: float = 3.0) -> None:
        """Add to a failed collective's error which ranks of this machine have ended.

        They may still be ending: their sockets close first.
        """
        if self.world.size == 1:
            return
        until = time.monotonic() + patience
        while not (gone := self.gone()) and time.monotonic() < until:
            time.sleep(0.1)
        for rank in gone:
            error.add_note(
                f"llmtrain: {rank} has ended, and {self.identity} needs it; if it says nothing "
                "itself it was killed: look for the out-of-memory killer, or for who did it"
            )

    def end(self, reason: str, code: int) -> None:
        """Report, wait for the others' reports, and end the process."""
        self.arm(4 * self.grace)
        report = self.report(reason)
        print(f"llmtrain: {reason}: {hang_report.summary(report)}", file=sys.stderr, flush=True)
        within(self.grace / 2, lambda: self.write(report))
        within(self.grace / 4, lambda: self.write(report | self.device_facts()))
        reports = self.wait_for_reports(report)
        if min(other["rank"] for other in reports) == self.identity.rank:
            self.conclude(reports)
        else:
            self.wait_until(lambda: (self.folder / "verdict.txt").exists(), self.grace / 2)
        within(2, sys.stdout.flush)
        within(2, sys.stderr.flush)
        os._exit(code)

    def report(self, reason: str) -> dict:
        mark = self.watch.mark
        described = hang_report.describe_process(
            self.identity, self.main_thread, self.ranks, reporter=threading.get_ident()
        )
        return {
            **mark._asdict(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "idle": time.monotonic() - mark.time,
            "reason": reason,
            **described,
        }

    def write(self, report: dict) -> None:
        """This rank's files: .json for the verdict, .txt for a person."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.identity.rank:05d}"
        path.with_suffix(".txt").write_text(hang_report.report_text(report), encoding="utf-8")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
        temporary.replace(path.with_suffix(".json"))

    def device_facts(self) -> dict:
        """Memory of the GPU and what NCCL was doing; asked last, because it may hang too."""
        if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return {}
        facts = {
            "cuda_allocated": torch.cuda.memory_allocated(),
            "cuda_reserved": torch.cuda.memory_reserved(),
        }
        c10d = torch._C._distributed_c10d
        if hasattr(c10d, "_dump_nccl_trace"):
            dump = c10d._dump_nccl_trace()
            (self.folder / f"nccl-rank-{self.identity.rank:05d}.pickle").write_bytes(dump)
            facts["nccl"] = nccl_status(pickle.loads(dump))
        return facts

    def wait_for_reports(self, own: dict) -> list[dict]:
        """All ranks' reports, or those that came within the grace; this rank's in any case."""
        self.wait_until(lambda: len(self.arrived()) == self.world.size, self.grace)
        reports = within(self.grace / 2, self.read_reports) or []
        return [r for r in reports if r["rank"] != own["rank"]] + [own]

    def arrived(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.json"))

    def read_reports(self) -> list[dict]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in self.arrived()]

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not within(self.grace / 2, condition):
            time.sleep(0.1)

    def conclude(self, reports: list[dict]) -> None:
        reports = sorted(reports, key=lambda report: report["rank"])
        text = (
            f"the run does not move ({time.strftime('%Y-%m-%dT%H:%M:%S%z')}, "
            f"{len(reports)} of {self.world.size} ranks gave a report)\n"
            f"{hang_report.verdict(reports, self.ranks)}\n"
            f"reports {self.folder}; the same command continues from the newest checkpoint\n"
        )
        print(f"llmtrain: {text}", end="", file=sys.stderr, flush=True)
        within(
            self.grace / 2,
            lambda: (self.folder / "verdict.txt").write_text(text, encoding="utf-8"),
        )


def nccl_status(dump: dict) -> dict:
    """Number of the last collective enqueued, started and completed, over all process groups."""
    groups = list(dump.get("pg_status", {}).values())

    def total(key: str) -> int | None:
        values = [int(group[key]) for group in groups if key in group]
        return sum(values) if values else None

    return {
        "enqueued": total("last_enqueued_collective"),
        "started": total("last_started_collective"),
        "completed": total("last_completed_collective"),
    }
