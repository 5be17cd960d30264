"""The folder of a submission, <run_dir>/slurm/<time>/, and what its jobs read of it.

job.sbatch, job_id         what was given to sbatch, and its answer
submission.json            this file's Submission
config.yaml, restart.yaml  the resolved configuration; the same, resuming by itself
launch.yaml                the keys of `llmtrain launch`
code/                      the packages as they were
prep.sbatch, eval.yaml ... the other jobs of a chain
job-<id>.log               what the driver and rank 0 print
starts/<id>-000/ ...       one folder a start: node check, how each rank ended
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "submission.json"
JOB_ID = "job_id"
# A file of a start's folder, as old as the start by the clock of the file system.
BEGAN = "began"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One training that was submitted. sizes: the numbers of nodes it can use, largest first.
    points: the folders of a sweep's trainings, which have submissions of their own."""

    folder: str
    run_dir: str
    code: str
    code_sha256: str
    python: str
    sizes: list[int]
    tasks_per_node: int
    gpus: int
    max_restarts: int
    srun: list[str]
    exclude: list[str]
    preflight: dict
    points: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def restart_config(self) -> Path:
        """Continues from the newest checkpoint whatever the first start was told to."""
        return self.path / "restart.yaml"

    @property
    def decisions(self) -> Path:
        return Path(self.run_dir) / "slurm" / "decisions.jsonl"

    @property
    def logs(self) -> Path:
        return Path(self.run_dir) / "logs"

    def start_folder(self, job: str, restart: int) -> Path:
        """Of a start of a job; the same file may be given to sbatch again, by hand."""
        return self.path / "starts" / f"{job}-{restart:03d}"

    def save(self) -> None:
        text = json.dumps(asdict(self), indent=1) + "\n"
        (self.path / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Submission:
        return cls(**json.loads((Path(folder) / FILE).read_text(encoding="utf-8")))


def new_folder(run_dir: Path) -> Path:
    """Make <run_dir>/slurm/<time>, or <time>-2 when there is one."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 100):
        folder = run_dir / "slurm" / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"run_dir: {run_dir}/slurm has 99 submissions of this second; wait for one")


def submissions(run_dir: str | Path) -> list[Path]:
    """The folders of the submissions of a run, oldest first."""
    found = (Path(run_dir) / "slurm").glob(f"*/{FILE}")
    return sorted((file.parent for file in found), key=lambda folder: folder.name)


def note_job(base: Submission, link: str, job: str) -> None:
    """Write down the id of a job: the training's, of each point of a sweep, or another link's."""
    if link != "train":
        (base.path / f"{link}_{JOB_ID}").write_text(f"{job}\n", encoding="utf-8")
        return
    (base.path / JOB_ID).write_text(f"{job}\n", encoding="utf-8")
    for number, point in enumerate(base.points):
        (Path(point) / JOB_ID).write_text(f"{job}_{number}\n", encoding="utf-8")


def job_id(folder: Path) -> str | None:
    """Slurm's name of the training's job; None when nothing was submitted."""
    file = folder / JOB_ID
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def append_line(file: Path, values: dict) -> None:
    """One line of JSON, durable."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(values) + "\n")
        out.flush()
        os.fsync(out.fileno())


def read_lines(file: Path) -> list[dict]:
    """The lines of a JSON log; those cut off while a machine stopped are left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
