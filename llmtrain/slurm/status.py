"""`llmtrain status`: a table of runs, from their folders and the queue."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config import load
from llmtrain.exits import STOPPED
from llmtrain.slurm import queue
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.endings import newest_step
from llmtrain.slurm.queue import Queued
from llmtrain.slurm.submission import job_id, read_lines, submissions

# Folders inside a run that hold no runs.
INSIDE = ("checkpoints", "slurm", "logs", "hangs", "eval", "tensorboard", "wandb")
DEPTH = 4
# Seconds without a sign of life in .lock after which a run outside of Slurm has died.
STALE = 90


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Times in seconds; None where nothing is known."""

    run: str
    state: str
    step: int | None
    total: int | None
    loss: float | None
    rate: float | None
    checkpoint: int | None
    age: float | None
    restarts: int
    job: str | None
    nodes: str
    eta: float | None

    def cells(self) -> tuple[str, ...]:
        steps = f"{shown(self.step)}/{shown(self.total)}"
        saved = "-" if self.checkpoint is None else f"{self.checkpoint} ({length(self.age)} ago)"
        return (
            self.run,
            self.state,
            steps,
            shown(self.loss, "{:.4f}"),
            shown(self.rate, "{:,.0f}"),
            saved,
            str(self.restarts),
            self.job or "-",
            self.nodes or "-",
            length(self.eta),
        )


TITLES = ("run", "state", "step", "loss", "tok/s", "checkpoint", "restarts", "job", "nodes", "left")


def show_status(config: dict) -> None:
    """Print the table."""
    root = Path(config["run_dir"] or config["root"])
    if not root.is_dir():
        key = "run_dir" if config["run_dir"] else "root"
        raise ValueError(f"{key}: {root} is no folder, expected one with runs; set {key}=...")
    jobs, note = asked_queue()
    rows = [row_of(run, root, jobs, time.time()) for run in runs(root)]
    if not rows:
        print(f"no runs in {root}")
        return
    print(table([TITLES, *(row.cells() for row in rows)]))
    if note:
        print(note)


def asked_queue() -> tuple[list[Queued], str]:
    """The queue; without Slurm none, and a note that says so."""
    if not queue.available():
        return [], ""
    try:
        return queue.read(), ""
    except SlurmError as error:
        return [], f"the queue is not known: {error}"


def runs(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The folders of runs at or below root, sorted by name."""
    if is_run(root):
        yield root
    if depth:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if folder.name not in INSIDE and not folder.name.startswith((".", "previous-")):
                yield from runs(folder, depth - 1)


def is_run(folder: Path) -> bool:
    """Whether something was trained here, or will be; a sweep's own folder is no run."""
    if (folder / "starts.jsonl").exists():
        return True
    return any((path / "config.yaml").exists() for path in submissions(folder))


def row_of(run: Path, root: Path, jobs: Sequence[Queued], now: float) -> Row:
    """What is known of a run."""
    mine = queue.of_run(run.absolute(), jobs)
    decisions = read_lines(run / "slurm" / "decisions.jsonl")
    trained = [line for line in read_lines(run / "metrics.jsonl") if line.get("kind") == "train"]
    last = trained[-1] if trained else {}
    total, state = total_steps(run), state_of(run, mine, decisions, now)
    step, seconds = last.get("step"), last.get("step_seconds")
    folders = submissions(run)
    again = sum(line["action"] in ("requeue", "wait") for line in decisions)
    eta = None
    if state == "running" and total is not None and step is not None and seconds is not None:
        eta = (total - step) * seconds
    saved = newest_step(run)
    return Row(
        run=run.name if run == root else str(run.relative_to(root)),
        state=state,
        step=step,
        total=total,
        loss=last.get("loss"),
        rate=last.get("tokens_per_second"),
        checkpoint=saved,
        age=None if saved is None else now - saved_at(run, saved),
        restarts=max(0, again, len(read_lines(run / "starts.jsonl")) - 1),
        job=mine[0].job if mine else (job_id(folders[-1]) if folders else None),
        nodes=mine[0].nodes if mine else (" ".join(decisions[-1]["nodes"]) if decisions else ""),
        eta=eta,
    )


def state_of(run: Path, jobs: Sequence[Queued], decisions: list[dict], now: float) -> str:
    """queued, requeued, running, ending; finished, stopped, failed, died; or not submitted."""
    if jobs:
        if jobs[0].state == "PENDING":
            again = any(line["job"] == jobs[0].job for line in decisions)
            held = " (held)" if "Held" in jobs[0].reason else ""
            return ("requeued" if again else "queued") + held
        return "running" if jobs[0].state in ("RUNNING", "CONFIGURING") else "ending"
    if not (run / "starts.jsonl").exists() and not decisions:
        submitted = any(job_id(folder) for folder in submissions(run))
        return "ended before a start" if submitted else "not submitted"
    holder = holder_of(run, now)
    if holder and not (holder.get("job") and queue.available()):  # the queue would have named it
        return "running"
    if finished(run):
        return "finished"
    if decisions and decisions[-1]["action"] == "end":
        return "stopped" if decisions[-1]["code"] == STOPPED else "failed"
    return "stopped" if (run / "summary.json").exists() else "died"


def holder_of(run: Path, now: float) -> dict:
    """Who works in the folder, by its lock (llmtrain/train/lock.py); empty when nobody lives."""
    file = run / ".lock"
    if not file.exists() or now - file.stat().st_mtime > STALE:
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8") or "{}")
    except json.JSONDecodeError:  # being written
        return {"pid": None, "host": None, "job": None}


def finished(run: Path) -> bool:
    file = run / "summary.json"
    if not file.exists():
        return False
    summary = json.loads(file.read_text(encoding="utf-8"))
    return bool(summary.get("training", summary).get("finished"))


def total_steps(run: Path) -> int | None:
    """Of the configuration that the run was last started or submitted with."""
    files = [run / "config.yaml", *(folder / "config.yaml" for folder in submissions(run)[-1:])]
    files = [file for file in files if file.exists()]
    if not files:
        return None
    train = load(max(files, key=lambda file: file.stat().st_mtime))["train"]
    return math.ceil(train["total_tokens"] / train["global_batch_tokens"])


def saved_at(run: Path, step: int) -> float:
    return (run / "checkpoints" / f"step-{step:08d}").stat().st_mtime


def shown(value: float | None, pattern: str = "{}") -> str:
    return "-" if value is None else pattern.format(value)


def length(seconds: float | None) -> str:
    """A time span in its two largest units."""
    if seconds is None:
        return "-"
    total = max(0, round(seconds))
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if total >= size:
            return f"{total // size}{unit}{total % size // below:02d}{smaller}"
    return f"{total // 60}m{total % 60:02d}s" if total >= 60 else f"{total}s"


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
