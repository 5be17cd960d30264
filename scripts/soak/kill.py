"""One cell of the matrix: a twin that runs undisturbed, and a run that is killed many times."""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from soak import checks
from soak.cells import KEEP, Cell
from soak.folder import Folder, State
from soak.moments import Aim, Pace, Trigger, landed, plan
from soak.ranks import ROOT, Job

# Seconds that a start may take before it counts as hanging.
LONGEST = 600.0


class Unexpected(Exception):
    """A start ended in a way that no kill explains."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells share. corpus: overrides that choose it; how: fork or exec; survivors: seconds
    that ranks may outlive a killed one."""

    work: Path
    corpus: list[str]
    how: str
    survivors: float
    seed: int


def commit() -> str:
    """The commit of the code, with a + when it was changed."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return (done.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def launch(
    cell: Cell,
    overrides: list[str],
    bench: Bench,
    run_dir: Path,
    log: str,
    logs: Path | None = None,
) -> Job:
    """Start `llmtrain train` on the cell's ranks; their output goes to logs/<log>-rank-<r>.log."""
    logs = logs or run_dir.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    argv = ["train", *bench.corpus, *overrides, f"run_dir={run_dir}"]
    return Job(argv, cell.ranks, logs / log, bench.how)


def finish(job: Job, watch=lambda: None, pause: float = 0.002) -> None:
    """Wait for a job that nobody disturbs; Unexpected unless it ends well."""
    while job.running():
        watch()
        codes = [code for code in job.codes() if code]
        if codes or job.seconds() > LONGEST:
            job.outlive(5.0)
            why = f"exit codes {job.codes()}" if codes else f"no end after {LONGEST:.0f} s"
            raise Unexpected(f"an undisturbed start failed: {why}\n{job.tail()}")
        time.sleep(pause)
    if any(job.codes()):
        raise Unexpected(f"an undisturbed start failed: exit codes {job.codes()}\n{job.tail()}")


class Stopwatch:
    """Learns an undisturbed run's pace by looking at its folder."""

    def __init__(self, job: Job, folder: Folder, steps: int):
        self.job, self.folder, self.steps = job, folder, steps
        self.started = self.first = self.last = None
        self.saving: float | None = None
        self.saves: list[float] = []

    def look(self) -> None:
        now = self.job.seconds()
        if self.started is None:
            self.started = now if self.folder.size("starts.jsonl") else None
            return
        step = self.folder.logged_step()
        if self.first is None and step:
            self.first = (now, step)
        if self.last is None and step >= self.steps:
            self.last = now
        writing = bool(self.folder.unfinished())
        if writing and self.saving is None:
            self.saving = now
        elif not writing and self.saving is not None:
            self.saves.append(now - self.saving)
            self.saving = None

    def pace(self) -> Pace:
        end = self.job.seconds()
        if self.started is None or self.first is None or self.last is None:
            raise Unexpected("an undisturbed run wrote no log")
        step = (self.last - self.first[0]) / max(1, self.steps - self.first[1])
        return Pace(
            start=self.started,
            step=step,
            save=sorted(self.saves)[len(self.saves) // 2] if self.saves else 0.01,
            validate=step,
            end=end - self.last,
        )


def watch_undisturbed(
    cell: Cell, overrides: list[str], bench: Bench, run_dir: Path
) -> tuple[Pace, float]:
    """The undisturbed run; its pace and its seconds."""
    job = launch(cell, overrides, bench, run_dir, run_dir.name)
    watch = Stopwatch(job, Folder(run_dir), cell.steps)
    finish(job, watch.look)
    return watch.pace(), job.seconds()


def killed_start(
    cell: Cell, bench: Bench, folder: Path, aim: Aim, pace: Pace, number: int
) -> tuple[dict, State]:
    """One start that is killed; what happened, and what it left."""
    run = Folder(folder / "run")
    before = run.state()
    job = launch(cell, cell.overrides() + cell.saving(), bench, run.path, f"start-{number:02d}")
    trigger = Trigger(aim, before, run, job, pace, cell.steps)
    pause = 0.0003 if aim.moment in ("save", "manifest", "rename", "delete") else 0.002
    while not trigger.fired():
        codes = job.codes()
        if any(codes) or job.seconds() > LONGEST:
            job.outlive(5.0)
            raise Unexpected(f"start {number} failed before its kill: {codes}\n{job.tail()}")
        if None not in codes:  # it finished: the moment never came
            return {"aim": aim.moment, "landed": None}, run.state()
        time.sleep(pause)
    seconds = job.seconds()
    job.kill(list(aim.victims))
    survivors = job.outlive(bench.survivors, aim.victims)
    now = run.state()
    problems = checks.after_kill(before, now, KEEP) + checks.resumed_right(before, now)
    resumed = max(now.good, default=0)
    row = {
        "aim": aim.moment,
        "landed": landed(before, now, cell.steps, cell.validation),
        "victims": list(aim.victims),
        "survivors": survivors,
        "seconds": round(seconds, 2),
        "step": now.last,
        "repeated": max(0, now.last - resumed),
        "good": sorted(now.good),
        "latest": now.latest,
        "problems": problems,
    }
    return row, now


def run_cell(cell: Cell, index: int, bench: Bench, folder: Path) -> dict:
    """All of a cell; the row of the results. folder: where its runs go."""
    began = time.monotonic()
    row = {
        "key": cell.key,
        "name": cell.name,
        "cell": asdict(cell),
        "commit": commit(),
        "start": bench.how,
    }
    kills: list[dict] = []
    problems: list[str] = []
    try:
        pace, row["twin_seconds"] = watch_undisturbed(
            cell, cell.overrides() + cell.saving("sync"), bench, folder / "twin"
        )
        row["pace"] = asdict(pace)
        expected = Folder(folder / "twin").state()
        for number, aim in enumerate(plan(cell, index, bench.seed)):
            kill, now = killed_start(cell, bench, folder, aim, pace, number)
            kills.append(kill)
            if kill["landed"] is None:
                break
            kill["problems"] += checks.prefix_differences(now, expected)
            problems += [f"kill {number}: {problem}" for problem in kill["problems"]]
        finish(launch(cell, cell.overrides() + cell.saving(), bench, folder / "run", "last"))
        problems += checks.finished_differences(folder / "run", folder / "twin", cell.steps)
    except Unexpected as error:
        problems.append(str(error))
    row |= {
        "kills": [kill for kill in kills if kill["landed"]],
        "restarts": len(kills),
        "repeated": sum(kill.get("repeated", 0) for kill in kills),
        "problems": problems,
        "equal": not problems,
        "seconds": round(time.monotonic() - began, 1),
    }
    return row
