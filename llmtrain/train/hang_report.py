"""What a rank says about itself when nothing moves, and what the ranks' reports say together.

A rank's report has its place (step, phase, how many marks it has passed), the stacks of all its
threads, whether its main thread waits for other ranks (a collective) or for its device, and what
the kernel says about the processes of the ranks on its machine.

The verdict is drawn from the marks. All ranks pass the same marks in the same order, so whoever
has passed fewest holds the others up, unless it waits itself. On a GPU the host runs ahead: it
hands collectives over and waits one step later, in read_results, for an event. Of ranks that wait
there none is to blame; the one that never handed its collective over stands at an earlier mark (in
data, forward, ...). When all wait, in the same place, the devices hang, not the hosts: NCCL's
flight recorder, dumped beside each report, tells the collective.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from llmtrain.train.processes import ALIVE, Identity, state_of

OWN_PACKAGES = ("llmtrain", "llmtrain_kernels", "llmtrain_data")
SITE = ("site-packages", "dist-packages")
STDLIB = str(Path(threading.__file__).parent)
# Where code waits for others, by the folder of its file.
WAITS = {
    "collective": ("torch/distributed/", "deepspeed/comm/"),
    "device": ("torch/cuda/streams.py",),
}
# Functions of torch.distributed that stand between a collective and its caller.
WRAPPERS = ("wrapper", "_time_estimator", "wait")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str
    own: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def frames_of(frame: FrameType | None) -> list[Frame]:
    """A stack, innermost first. Reads no file: the file system may be what hangs."""
    found = []
    while frame is not None:
        code = frame.f_code
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        found.append(
            Frame(
                file=short(code.co_filename, package),
                line=frame.f_lineno or 0,
                function=code.co_name,
                own=package in OWN_PACKAGES,
            )
        )
        frame = frame.f_back
    return found


def short(file: str, package: str) -> str:
    """A path from its package on."""
    parts = Path(file).parts
    for i, part in enumerate(parts):
        if part in SITE:
            return "/".join(parts[i + 1 :])
    if file.startswith(STDLIB):
        return file[len(STDLIB) + 1 :]
    if package in parts:
        return "/".join(parts[parts.index(package) :])
    return file


def stacks() -> dict[str, tuple[int, list[Frame]]]:
    """Name of every thread -> (its id, its stack)."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'thread')} ({ident})": (ident, frames_of(frame))
        for ident, frame in sys._current_frames().items()
    }


def waiting(frames: list[Frame]) -> tuple[str, str] | None:
    """(collective | device, the function called) when a stack waits for others, else None."""
    found = None
    for frame in frames:
        if frame.own:
            break
        for kind, places in WAITS.items():
            if any(place in f"{frame.file}" for place in places) and frame.function not in WRAPPERS:
                found = kind, frame.function
    return found


def place(frames: list[Frame]) -> str:
    """The innermost line of our own, and what it called if that is Python too."""
    own = next((frame for frame in frames if frame.own), None)
    if own is None:
        return str(frames[0]) if frames else "no Python code"
    return str(own) if own is frames[0] else f"{frames[0]}, called by {own}"


def describe_process(
    identity: Identity, main_thread: int, ranks: list[Identity], *, reporter: int
) -> dict:
    """The part of a report that is asked of the interpreter and the kernel.

    main_thread: the id of the training's thread; reporter: that of the one that asks.
    """
    found = stacks()
    main = next((frames for ident, frames in found.values() if ident == main_thread), [])
    waits = waiting(main)
    others = {
        name: frames
        for name, (ident, frames) in found.items()
        if ident not in (main_thread, reporter) and not is_idle(frames)
    }
    if waits is None and main and waits_for_thread(main[0]):
        waits = next((w for w in map(waiting, others.values()) if w is not None), None)
    peers = {
        str(rank.rank): state_of(rank.pid, rank.started)
        for rank in ranks
        if rank.boot == identity.boot and rank.rank != identity.rank
    }
    return {
        "rank": identity.rank,
        "host": identity.host,
        "pid": identity.pid,
        "job": identity.job,
        "waits": waits,
        "place": place(main),
        "threads_at": {name: place(frames) for name, frames in others.items()},
        "peers": peers,
        "stacks": {name: [str(f) for f in frames] for name, (_, frames) in found.items()},
    }


def waits_for_thread(innermost: Frame) -> bool:
    """Whether a thread leaves its work to another one: the backward pass on a GPU, a save."""
    return innermost.function == "_engine_run_backward" or innermost.file == "threading.py"


def is_idle(frames: list[Frame]) -> bool:
    """Whether a thread waits for work, or does nothing of ours."""
    own = [frame for frame in frames if frame.own]
    return not own or frames[0].file.endswith("threading.py")


def report_text(report: dict) -> str:
    """A report for a person to read."""
    lines = [summary(report), f"process state of other ranks here: {report['peers'] or 'none'}"]
    for name, frames in report["stacks"].items():
        lines += ["", f"{name}, innermost first:", *(f"  {frame}" for frame in frames)]
    return "\n".join(lines) + "\n"


def summary(report: dict) -> str:
    """A report in one line."""
    slow = " (may compile)" if report["slow"] else ""
    where = f"step {report['step']}, {report['phase']}{slow}, for {report['idle']:.0f} s"
    if report["waits"]:
        kind, function = report["waits"]
        where += f"; waits for {'other ranks' if kind == 'collective' else 'its device'}"
        where += f" in {function}"
    threads = "".join(f"; thread {name} at {at}" for name, at in report["threads_at"].items())
    return f"{who(report)}: {where}; at {report['place']}{threads}"


def who(report: dict) -> str:
    return f"rank {report['rank']} (host {report['host']}, pid {report['pid']})"


def verdict(reports: list[dict], ranks: list[Identity]) -> str:
    """Which ranks hold the others up and where, from the reports that came. Lines of text."""
    came = {report["rank"] for report in reports}
    lines = [silent_line(rank, reports, ranks) for rank in ranks if rank.rank not in came]
    busy = [report for report in reports if not report["waits"]]
    first = min((r["count"] for r in busy), default=None)
    lag = [report for report in busy if report["count"] == first]
    # beside a silent rank nobody is to blame for standing where all others stand
    furthest = lines and first == max(report["count"] for report in reports)
    lines += [f"{'runs' if furthest else 'lags':8}{summary(report)}" for report in lag]
    rest = [report for report in reports if report not in lag]
    if len({report["count"] for report in rest}) > 1 and not lag:
        least = min(report["count"] for report in rest)
        lines += [f"behind  {summary(r)}" for r in rest if r["count"] == least]
        rest = [report for report in rest if report["count"] != least]
    if not lines:
        lines.append(
            "no rank lags behind: all wait in the same place, so a device or a link between them "
            "hangs and not a process"
        )
    lines += [f"waits   {summary(r)}" for r in rest]
    return "\n".join([*lines, *nccl_lines(reports)])


def silent_line(rank: Identity, reports: list[dict], ranks: list[Identity]) -> str:
    """What is known of a rank that gave no report."""
    states = [r["peers"][str(rank.rank)] for r in reports if str(rank.rank) in r["peers"]]
    here = [r.rank for r in ranks if r.host == rank.host]
    if states and states[0] == ALIVE:
        known = "alive, but no Python code of it runs: blocked in native code"
    elif states:
        known = states[0]
    elif not any(report["rank"] in here for report in reports):
        known = f"no rank of host {rank.host} gave one: the machine is down or cut off"
    else:
        known = "stopped or ended"
    return f"silent  {rank} gave no report: {known}"


def nccl_lines(reports: list[dict]) -> list[str]:
    """Ranks whose GPU has started fewer collectives than others', from the flight recorder."""
    started = {r["rank"]: r["nccl"]["started"] for r in reports if (r.get("nccl") or {})}
    started = {rank: number for rank, number in started.items() if number is not None}
    if len(set(started.values())) < 2:
        return []
    most = max(started.values())
    late = [f"rank {rank} ({n})" for rank, n in sorted(started.items()) if n < most]
    return [f"nccl    collectives started on the device: {most}, but fewer on {', '.join(late)}"]
