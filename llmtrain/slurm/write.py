"""Writing a submission folder: code, configurations and the files for sbatch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from llmtrain.slurm import queue, snapshot, template
from llmtrain.slurm.resources import Resources
from llmtrain.slurm.submission import Submission, new_folder
from llmtrain.slurm.training import Training


@dataclass(frozen=True, kw_only=True)
class Link:
    """A job of a chain beside the training: one command of llmtrain on one node."""

    command: str
    config: dict
    resources: Resources


def write(
    run_dir: Path, name: str, trainings: Sequence[Training], wanted: dict, links: Sequence[Link]
) -> Submission:
    """The folder of a submission; trainings: one in run_dir, or the points of a sweep below it."""
    folder = new_folder(run_dir)
    facts = snapshot.take(folder / "code")
    resources = trainings[0].resources
    base = Submission(
        folder=str(folder),
        run_dir=str(run_dir),
        code=str(folder / "code"),
        code_sha256=facts["sha256"],
        python=wanted["python"] or sys.executable,
        sizes=trainings[0].sizes,
        tasks_per_node=resources.tasks_per_node,
        gpus=resources.gpus,
        max_restarts=wanted["max_restarts"],
        srun=wanted["srun"],
        exclude=wanted["exclude"],
        preflight=wanted["preflight"],
    )
    places = [Path(os.path.abspath(training.config["run_dir"])) for training in trainings]
    if places == [run_dir]:
        write_configs(base, trainings[0])
    else:
        points = [
            write_point(base, place, training)
            for place, training in zip(places, trainings, strict=True)
        ]
        base = replace(base, points=points)
    base.save()
    save(wanted, folder / "launch.yaml")
    text = template.render("train.sbatch", job_values(base, name, resources, wanted))
    (folder / "job.sbatch").write_text(text, encoding="utf-8")
    for link in links:
        save(link.config, folder / f"{link.command}.yaml")
        text = template.render("task.sbatch", link_values(base, name, link, wanted))
        (folder / f"{link.command}.sbatch").write_text(text, encoding="utf-8")
    return base


def write_point(base: Submission, run_dir: Path, training: Training) -> str:
    """The submission of one training of a sweep; it shares the code."""
    folder = new_folder(run_dir)
    point = replace(base, folder=str(folder), run_dir=str(run_dir), sizes=training.sizes)
    write_configs(point, training)
    point.save()
    return str(folder)


def write_configs(submission: Submission, training: Training) -> None:
    save(training.config, submission.config)
    # What the first start takes from train.resume is settled for those after it.
    settled = training.config if training.setup is None else training.setup.config
    again = {**settled, "train": {**settled["train"], "resume": "auto"}}
    save(again, submission.restart_config)


def job_values(
    base: Submission, name: str, resources: Resources, wanted: dict
) -> dict[str, str | list[str]]:
    """What fills the placeholders of train.sbatch."""
    values = common_values(base, name, resources, wanted)
    log = "job-%j.log"
    if base.points:
        limit = "" if wanted["array_limit"] is None else f"%{wanted['array_limit']}"
        values["options"].append(f"--array=0-{len(base.points) - 1}{limit}")
        log = "job-%A_%a.log"
    return values | {
        "comment": queue.comment(base.run_dir),
        "nodes": resources.node_range,
        "log": escape(base.folder) + "/" + log,
        "signal_seconds": str(wanted["signal_seconds"]),
        "submission": base.folder,
    }


def link_values(
    base: Submission, name: str, link: Link, wanted: dict
) -> dict[str, str | list[str]]:
    """What fills the placeholders of task.sbatch."""
    return common_values(base, f"{name}-{link.command}", link.resources, wanted) | {
        "log": f"{escape(base.folder)}/{link.command}-%j.log",
        "comment": queue.comment(base.run_dir, link.command),
        "srun": ["--kill-on-bad-exit=1", *wanted["srun"]],
        "command": link.command,
        "config": f"{base.folder}/{link.command}.yaml",
    }


def common_values(
    base: Submission, name: str, resources: Resources, wanted: dict
) -> dict[str, str | list[str]]:
    environment = list(wanted["setup"])
    if resources.cpus_per_task:
        # srun does not take it from the job; libraries would start a thread for each core.
        threads = resources.cpus_per_task
        environment.append(f"export SRUN_CPUS_PER_TASK={threads}")
        environment.append(f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}")
    return {
        "name": name,
        "options": resources.options(),
        "directory": os.getcwd(),
        "code": base.code,
        "environment": environment,
        "python": base.python,
    }


def escape(path: str) -> str:
    """A path in an option where % begins a placeholder of Slurm."""
    return path.replace("%", "%%")


def save(config: dict, path: Path) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
