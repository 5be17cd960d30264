"""The run folder: what was run, every step it made, and one line on the console an interval.

    config.yaml      the resolved configuration      starts.jsonl   one line a start: command,
    git.diff         uncommitted changes, if any                    commit, versions, seed, ranks
    metrics.jsonl    one line an interval, kind train, val or save: the truth that trackers mirror
    ledger.jsonl     one line an optimizer step: applied or why not, loss, norm, lr, samples
    run.log          messages: the attention backend chosen and why, warnings

Steps count from 1: "step": 7 was written after the 7th optimizer step. A resumed run cuts both
logs at the step it resumes from.
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

LOGGERS = ("llmtrain", "llmtrain_kernels")
PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "tokenizers", "triton", "flash-attn")


class RunLog:
    """Writes on rank 0; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, writes: bool, total_steps: int, tracker: Tracker):
        self.run_dir, self.writes, self.total_steps = run_dir, writes, total_steps
        self.tracker = tracker
        self.progress: Progress | None = None

    def start(self, config: dict, facts: dict, *, resumed_step: int) -> None:
        """Cut the logs at resumed_step and note this start. facts: what only the run knows."""
        if not self.writes:
            return
        save(config, self.run_dir)
        commit, changes = git_state()
        if changes:
            (self.run_dir / "git.diff").write_text(changes, encoding="utf-8")
        self.metrics = append_from(self.run_dir / "metrics.jsonl", resumed_step)
        self.ledger = append_from(self.run_dir / "ledger.jsonl", resumed_step)
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
            write_line(self.ledger, {"step": step, **values})
            if self.progress:
                self.progress.update(self.bar, completed=step)

    def interval(
        self, step: int, kind: str, values: dict[str, float], *, now: int | None = None
    ) -> None:
        """One line of metrics.jsonl, mirrored to the tracker and the console.

        now: the step that has been reached, if not this one; trackers take no earlier one.
        """
        if not self.writes:
            return
        write_line(self.metrics, {"step": step, "kind": kind, **values})
        prefix = "" if kind == "train" else f"{kind}/"
        mirrored = {f"{prefix}{name}": value for name, value in values.items()}
        try:
            self.tracker.log(now or step, mirrored)
        except OSError as error:  # a full disk is no reason to end the training
            log.warning("the tracker could not write step %d: %s", step, error)
        self.say(console_line(step, self.total_steps, kind, values))

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
            self.handler.close()
            self.metrics.close()
            self.ledger.close()
            self.tracker.close()


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

    def close(self) -> None:
        self.write("")
        if self.waiting:
            log.error("%s lacks its last %d bytes", self.path, len(self.waiting))
        self.file.close()


def write_line(file: Lines, values: dict) -> None:
    file.write(json.dumps({key: finite(value) for key, value in values.items()}) + "\n")


def append_from(path: Path, step: int) -> Lines:
    """Open a log for appending after the lines up to that step; later and cut-off lines go."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:  # written while the machine stopped
                continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
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
    "skipped": "skipped {:.0f}",
    "bytes": "durable, {:,.0f} bytes",
    "write_seconds": "written in {:.2f} s",
    "bytes_per_second": "{:,.0f} bytes/s",
    "stall_seconds": "training waited {:.3f} s",
}


def console_line(step: int, total: int, kind: str, values: dict[str, float]) -> str:
    """One interval in one line; skips and data wait only when there were any."""
    parts = [f"{kind} {step}/{total}"]
    for name, pattern in CONSOLE.items():
        value = values.get(name)
        quiet = name in ("skipped", "data_wait_seconds") and value is not None and value < 1e-3
        if value is not None and not quiet:
            parts.append(pattern.format(value))
    return " | ".join(parts)


def git_state() -> tuple[str | None, str]:
    """(commit, uncommitted changes) of this package's checkout; (None, "") without one."""
    root = Path(llmtrain.__file__).resolve().parents[1]
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
