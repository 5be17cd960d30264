"""The run folder: what was run, every step it made, and one line on the console an interval.

    config.yaml      the resolved configuration      starts.jsonl   one line a start: command,
    git.diff         uncommitted changes, if any                    commit, versions, seed, ranks
    metrics.jsonl    one line an interval, kind train, val or save: the truth; trackers mirror it
    ledger.jsonl     one line an optimizer step: applied or why not, loss, norm, lr, samples;
                     and lines with "event": a rollback, a fault
    run.log          messages: the attention backend chosen and why, warnings

Steps count from 1: "step": 7 was written after the 7th optimizer step. After a rollback the steps
from there on come again, with a "course" one higher; (step, course) is unique. A resumed run cuts
both logs at the step of the course that it resumes from.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import llmtrain
from llmtrain.config import save
from llmtrain.train.tracker import Tracker

log = logging.getLogger(__name__)

# Beside the packages that `llmtrain launch` copied (llmtrain/slurm/snapshot.py).
SNAPSHOT_FACTS = "code.json"
LOGGERS = ("llmtrain", "llmtrain_kernels")
PACKAGES = (
    *("torch", "deepspeed", "numpy", "safetensors", "tokenizers", "triton"),
    *("flash-attn", "nvidia-cudnn-frontend"),
)


class RunLog:
    """Writes on rank 0; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, writes: bool, total_steps: int, tracker: Tracker):
        self.run_dir, self.writes, self.total_steps = run_dir, writes, total_steps
        self.tracker = tracker
        self.progress: Progress | None = None
        self.course = 0

    def start(self, config: dict, facts: dict, *, resumed_step: int, course: int = 0) -> None:
        """Cut the logs at resumed_step and note this start. facts: what only the run knows."""
        self.course, self.config = course, config
        if not self.writes:
            return
        save(config, self.run_dir)
        commit, changes = git_state()
        if changes:
            (self.run_dir / "git.diff").write_text(changes, encoding="utf-8")
        self.metrics = append_from(self.run_dir / "metrics.jsonl", resumed_step, course)
        self.ledger = append_from(self.run_dir / "ledger.jsonl", resumed_step, course)
        kept = read_lines(self.run_dir / "metrics.jsonl")
        self.written = {(line["step"], line.get("course", 0), line.get("kind")) for line in kept}
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_step": resumed_step,
            "command": sys.argv,
            "seed": config["seed"],
            "commit": commit,
            "uncommitted_changes": bool(changes),
            "versions": versions(),
            **facts,
        }
        with (self.run_dir / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.handler = logging.FileHandler(self.run_dir / "run.log", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self.handler)
        self.tracker.start(self.run_dir, config=config, resumed_step=resumed_step)
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(),
            )
            self.bar = self.progress.add_task("", total=self.total_steps, completed=resumed_step)
            self.progress.start()

    def step(self, step: int, values: dict) -> None:
        """One line of the ledger."""
        if self.writes:
            write_line(self.ledger, {"step": step, "course": self.course, **values})
            if self.progress:
                self.progress.update(self.bar, completed=step)

    def event(self, step: int, event: str, values: dict) -> None:
        """Something that happened at a step: a durable line of the ledger, also on the console."""
        if self.writes:
            line = {"event": event, "step": step, "course": self.course, **values}
            write_line(self.ledger, line)
            self.ledger.sync()
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            self.say(f"{event} at step {step}: {shown}")

    def rewind(self, step: int, course: int) -> None:
        """The steps after this one come again, in a new course."""
        self.course = course
        if self.writes:
            # Trackers take no step twice: a new part begins, as at a resume.
            self.tracker.close()
            self.tracker.start(self.run_dir, config=self.config, resumed_step=step)
            if self.progress:
                self.progress.update(self.bar, completed=step)

    def health(self, step: int, event: str, values: dict, factor: float) -> None:
        """What was noticed about the ranks: a line of metrics.jsonl, of kind health, and of the
        ledger."""
        if self.writes:
            write_line(self.metrics, {"step": step, "kind": "health", "event": event, **values})
            write_line(self.ledger, {"event": event, "step": step, **values})
            self.mirror(step, {f"health/{event}": factor})

    def mirror(self, step: int, values: dict[str, float]) -> None:
        try:
            self.tracker.log(step, values)
        except OSError as error:  # a full disk is no reason to end the training
            log.warning("the tracker could not write step %d: %s", step, error)

    def interval(
        self, step: int, kind: str, values: dict[str, float], *, now: int | None = None
    ) -> None:
        """One line of metrics.jsonl, mirrored to the tracker and the console.

        now: the step that has been reached, if not this one; trackers take no earlier one.

        A finished run that is started again validates again: its line is there already.
        """
        if not self.writes:
            return
        if (step, self.course, kind) not in self.written:
            line = {"step": step, "course": self.course, "kind": kind, **values}
            write_line(self.metrics, line)
        prefix = "" if kind == "train" else f"{kind}/"
        self.mirror(now or step, {f"{prefix}{name}": value for name, value in values.items()})
        self.say(console_line(step, self.total_steps, kind, values))

    def summary(self, values: dict) -> None:
        """summary.json, and the planner's error on the console."""
        if not self.writes:
            return
        memory = values["memory"]
        if "planned_gib" in memory:
            self.say(
                f"memory: planned {memory['planned_gib']:.2f} GiB, peak {memory['peak_gib']:.2f} "
                f"GiB ({memory['planned/peak'] - 1:+.0%})"
            )
        text = json.dumps(values, indent=1) + "\n"
        (self.run_dir / "summary.json").write_text(text, encoding="utf-8")

    def say(self, text: str) -> None:
        """A line on the console, above the bar if there is one."""
        if not self.writes:
            return
        if self.progress:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.writes and hasattr(self, "ledger"):
            if self.progress:
                self.progress.refresh()
                self.progress.stop()
            for name in LOGGERS:
                logging.getLogger(name).removeHandler(self.handler)
            for part in (self.handler, self.metrics, self.ledger, self.tracker):
                try:
                    part.close()
                except OSError as error:  # a full disk does not hide why the run ended
                    log.error("%s: could not be written to its end: %s", self.run_dir, error)


def finite(value: object) -> object:
    """JSON has no NaN: null instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A log open for appending. What a full disk does not take is kept, and written later."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, b""
        self.file = path.open("ab", buffering=0)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: str) -> None:
        waited = bool(self.waiting)
        self.waiting += text.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not waited:
                log.warning("%s is written later: %s", self.path, error)

    def sync(self) -> None:
        """See that what was written is on the disk."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            log.warning("%s may lack its last line after a crash: %s", self.path, error)

    def close(self) -> None:
        self.write("")
        if self.waiting:
            log.error("%s lacks its last %d bytes", self.path, len(self.waiting))
        self.file.close()


def write_line(file: Lines, values: dict) -> None:
    file.write(json.dumps({key: finite(value) for key, value in values.items()}) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The lines of a log; one that was written while the machine stopped is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def append_from(path: Path, step: int, course: int) -> Lines:
    """Open a log for appending after that step of that course.

    What the course did later goes, and all of later courses, which are left; events stay, but for
    rollbacks that are left.
    """

    def stays(line: dict) -> bool:
        at = line.get("course", 0)
        if "event" in line:
            return line["event"] != "rollback" or at <= course
        return at < course or (at == course and line["step"] <= step)

    kept = [line for line in read_lines(path) if stays(line)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return Lines(path)


# Name in metrics.jsonl -> how the console shows it.
CONSOLE = {
    "loss": "loss {:.4f}",
    "bits_per_byte": "bpb {:.4f}",
    "grad_norm": "norm {:.3f}",
    "lr": "lr {:.2e}",
    "tokens": "{:,.0f} tokens",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "step_seconds": "{:.3f} s/step",
    "data_wait_seconds": "data {:.3f} s",
    "memory_gib": "mem {:.2f} GiB",
    "guard/skipped": "skipped {:.0f}",
    "guard/rollbacks": "rollbacks {:.0f}",
    "bytes": "durable, {:,.0f} bytes",
    "write_seconds": "written in {:.2f} s",
    "bytes_per_second": "{:,.0f} bytes/s",
    "stall_seconds": "training waited {:.3f} s",
    "end_wait_seconds": "the end waited {:.3f} s",
}

# Shown only when there was any.
QUIET = ("guard/skipped", "guard/rollbacks", "data_wait_seconds", "end_wait_seconds")


def console_line(step: int, total: int, kind: str, values: dict[str, float]) -> str:
    """One interval in one line; skips and data wait only when there were any."""
    parts = [f"{kind} {step}/{total}"]
    for name, pattern in CONSOLE.items():
        value = values.get(name)
        quiet = name in QUIET and value is not None and value < 1e-3
        if value is not None and not quiet:
            parts.append(pattern.format(value))
    return " | ".join(parts)


def git_state() -> tuple[str | None, str]:
    """(commit, uncommitted changes) of this package's checkout, or of the one it was copied from by
    `llmtrain launch`; (None, "") without one."""
    root = Path(llmtrain.__file__).resolve().parents[1]
    if (root / SNAPSHOT_FACTS).exists():
        facts = json.loads((root / SNAPSHOT_FACTS).read_text(encoding="utf-8"))
        changes = root / "git.diff"
        return facts["commit"], changes.read_text(encoding="utf-8") if changes.exists() else ""
    if not (root / ".git").exists():
        return None, ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("git commit and diff are not noted: %s", error)
        return None, ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "llmtrain": llmtrain.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def check_writable(run_dir: Path) -> None:
    """ValueError unless files can be made in the run folder (it is created)."""
    probe = run_dir / f".probe-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot write to {run_dir} ({error.strerror}), expected a writable folder; "
            "set run_dir=..."
        ) from error
