"""The jobs that Slurm knows of, and which run each belongs to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.slurm import cluster
from llmtrain.slurm.submission import job_id, submissions

FORMAT = "%F|%K|%T|%D|%N|%r|%M|%k"
LINKS = ("prep", "train", "eval")
OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job, or a task of an array ("12_3"). comment: names its run."""

    job: str
    state: str
    nodes: str
    reason: str
    comment: str

    @property
    def over(self) -> bool:
        return self.state in OVER


def read() -> list[Queued]:
    """Pending and running jobs of everybody, tasks of arrays one by one."""
    return parse(cluster.run(["squeue", "--noheader", "--array", f"--format={FORMAT}"]))


def parse(text: str) -> list[Queued]:
    """Of `squeue --noheader --array --format=<FORMAT>`."""
    found = []
    for line in text.splitlines():
        base, task, state, _, nodes, reason, _, comment = line.strip().split("|", 7)
        job = base if task == "N/A" else f"{base}_{task}"
        found.append(Queued(job=job, state=state, nodes=nodes, reason=reason, comment=comment))
    return found


def available() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("squeue") is not None


def comment(run_dir: str | Path, link: str = "train") -> str:
    """How squeue shows which run a job belongs to, and what it does with it."""
    return f"llmtrain {link} {run_dir}"


def of_run(
    run_dir: Path, jobs: Sequence[Queued], links: Sequence[str] = ("train",)
) -> list[Queued]:
    """The jobs of a run that are not over: by what they were submitted with, or their ids."""
    ids = {job for folder in submissions(run_dir) if (job := job_id(folder))}
    comments = [comment(run_dir, link) for link in links]
    return [job for job in jobs if not job.over and (job.comment in comments or job.job in ids)]


def check_free(run_dir: Path, jobs: Sequence[Queued]) -> None:
    """ValueError when a job of this run is already there."""
    for job in of_run(run_dir, jobs, LINKS):
        raise ValueError(
            f"run_dir: {run_dir} has job {job.job} already ({job.state.lower()}), expected one job "
            f"a run; wait for it, scancel {job.job}, or give this run another name=..."
        )
