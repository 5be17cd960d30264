"""Talking to Slurm's programs, and reading what they print."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Slurm may be busy for minutes, on large clusters.
PATIENCE = 300


class SlurmError(ValueError):
    """A program of Slurm refused, with its message."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a program of Slurm prints. SlurmError when it is missing or refuses."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: not found on this machine, expected Slurm's programs; submit from a "
            "login node of the cluster, or set dry_run=true to write the files only"
        )
    done = subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
        preexec_fn=deaf,
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or " ".join(done.stdout.split())
        raise SlurmError(f"{' '.join(command)}: Slurm refused: {said or done.returncode}")
    return done.stdout


def deaf() -> None:
    """Slurm signals all processes of a job that ends; a question that is under way is finished."""
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def submit(file: Path, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """The id of the new job."""
    answer = run(["sbatch", "--parsable", *options, str(file)], environment)
    return answer.strip().split(";")[0]  # "id" or "id;cluster"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the controller says of a job. restarts: how often it was put back into the queue.
    preempted: whether this start is being preempted, with some grace left."""

    state: str
    reason: str
    restarts: int
    preempted: bool

    @property
    def running(self) -> bool:
        return "RUNNING" in self.words and "COMPLETING" not in self.words

    @property
    def pending(self) -> bool:
        return "PENDING" in self.words

    @property
    def words(self) -> list[str]:
        """Some versions add flags: CANCELLED,COMPLETING."""
        return self.state.replace("+", ",").split(",")


def parse_job(text: str) -> Job:
    """Of `scontrol --oneliner show job <id>`."""
    fields = dict(
        word.split("=", 1) for word in text.split() if "=" in word and not word.startswith("=")
    )
    begun, preempted = fields.get("StartTime", ""), fields.get("PreemptTime", "")
    return Job(
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", 0)),
        preempted=preempted[:1].isdigit() and preempted >= begun,
    )


def show_job(job_id: str) -> Job:
    return parse_job(run(["scontrol", "--oneliner", "show", "job", job_id]))


def expand(nodelist: str) -> list[str]:
    """ "n[1-3,7]" -> the names."""
    if not nodelist:
        return []
    return run(["scontrol", "show", "hostnames", nodelist]).split()


def nodes_of(partition: str | None) -> list[str]:
    """The names of all nodes of a partition (of the cluster), in whatever state."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N"]
    return sorted(
        set(run([*command, *([f"--partition={partition}"] if partition else [])]).split())
    )
