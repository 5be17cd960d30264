"""`llmtrain launch`: check a training here, write its submission folder, and give it to Slurm."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from llmtrain import config as configuration
from llmtrain import groups, plan
from llmtrain.distributed import World
from llmtrain.prep import check_tokenizer
from llmtrain.slurm import cluster, snapshot, template
from llmtrain.slurm.resources import Resources
from llmtrain.slurm.submission import JOB_ID, Submission, new_folder
from llmtrain.train.setup import Setup

# Variables of the shell that submits which would tell the ranks who they are.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launch(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> None:
    """Carry out one command line; prints the plan and the job."""
    keys, rest = split(overrides)
    wanted = configuration.compose("launch", keys, config_dirs=config_dirs)
    resources = Resources.of(wanted)
    device = f"train.device={'cuda' if resources.gpus else 'cpu'}"
    config = configuration.compose("train", with_device(rest, device), config_dirs=config_dirs)
    training = Training.check(config, resources)
    print(training.describe(), flush=True)
    folder = write(training, wanted)
    print(f"submission  {folder}")
    if wanted["dry_run"]:
        print(f"dry_run: nothing submitted; by hand: sbatch {folder / 'job.sbatch'}")
        return
    job = cluster.submit(folder / "job.sbatch", clean_environment())
    (folder / JOB_ID).write_text(f"{job}\n", encoding="utf-8")
    print(f"job         {job}")


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides of launch.yaml, those of `llmtrain train`)."""
    own = yaml.safe_load((groups.config_root() / "launch.yaml").read_text(encoding="utf-8"))
    keys, rest = [], []
    for text, override in zip(overrides, groups.parse(overrides), strict=True):
        first = override.key_or_group.partition(".")[0]
        (keys if first in own else rest).append(text)
    return keys, rest


def with_device(overrides: list[str], device: str) -> list[str]:
    """The overrides with the device that the job's resources mean, unless they name one."""
    typed = groups.given(groups.parse(overrides), "train.device")
    if typed is None or typed.value() == "auto":
        return [*(text for text in overrides if not text.startswith("train.device=")), device]
    if typed.input_line != device:
        raise ValueError(
            f"{typed.input_line}: got this for a job whose ranks have {device}, expected the two "
            "to agree; set gpus=<a node> for GPUs, gpus=0 for CPU ranks, or remove it"
        )
    return overrides


@dataclass(frozen=True, kw_only=True)
class Training:
    """A checked training. sizes: the numbers of nodes whose ranks the rows divide among."""

    config: dict
    resources: Resources
    setup: Setup
    sizes: list[int]

    @classmethod
    def check(cls, config: dict, resources: Resources) -> Training:
        """The checks of `llmtrain train`, for every number of nodes the job may get."""
        check_tokenizer(config)
        sizes = usable_sizes(config, resources)
        world = World(rank=0, size=resources.nodes * resources.tasks_per_node, local_rank=0)
        device = torch.device("cuda" if resources.gpus else "cpu")
        setup = Setup.check(config, world, device, elsewhere=True)
        return cls(config=config, resources=resources, setup=setup, sizes=sizes)

    def describe(self) -> str:
        resources = self.resources
        unit = f"{resources.gpus} GPUs" if resources.gpus else f"{resources.tasks_per_node} ranks"
        lines = [self.setup.describe(), f"nodes       {resources.node_range} of {unit}"]
        left_out = sorted(set(resources.sizes) - set(self.sizes))
        for size in left_out:
            used = max(usable for usable in self.sizes if usable < size)
            lines.append(
                f"            of {size} nodes {used} would work: the {self.setup.plan.rows} rows "
                f"of a step do not divide among {size * resources.tasks_per_node} ranks"
            )
        return "\n".join(lines)


def usable_sizes(config: dict, resources: Resources) -> list[int]:
    """The numbers of nodes, of those the job may get, that can share the rows of a step. ValueError
    when the largest or the smallest is not among them."""
    usable, refusals = [], {}
    for nodes in resources.sizes:
        try:
            plan.check_ranks(config, nodes * resources.tasks_per_node)
        except ValueError as error:
            refusals[nodes] = str(error)
        else:
            usable.append(nodes)
    for nodes in (resources.nodes, resources.min_nodes):
        if nodes in refusals:
            key = "nodes" if nodes == resources.nodes else "min_nodes"
            raise ValueError(f"{key}={nodes}: {refusals[nodes]}")
    return usable


def write(training: Training, wanted: dict) -> Path:
    """The submission folder: code, configurations, job.sbatch."""
    config, resources = training.config, training.resources
    run_dir = Path(os.path.abspath(config["run_dir"]))
    folder = new_folder(run_dir)
    facts = snapshot.take(folder / "code")
    submission = Submission(
        folder=str(folder),
        run_dir=str(run_dir),
        code=str(folder / "code"),
        code_sha256=facts["sha256"],
        python=wanted["python"] or sys.executable,
        sizes=training.sizes,
        tasks_per_node=resources.tasks_per_node,
        gpus=resources.gpus,
        max_restarts=wanted["max_restarts"],
        srun=wanted["srun"],
        exclude=wanted["exclude"],
        preflight=wanted["preflight"],
    )
    submission.save()
    save(config, submission.config)
    again = {**config, "train": {**config["train"], "resume": "auto"}}
    save(again, submission.restart_config)
    save(wanted, folder / "launch.yaml")
    text = template.render("train.sbatch", job_values(submission, config["name"], wanted))
    (folder / "job.sbatch").write_text(text, encoding="utf-8")
    return folder


def job_values(submission: Submission, name: str, wanted: dict) -> dict[str, str | list[str]]:
    """What fills the placeholders of train.sbatch."""
    resources = Resources.of(wanted)
    environment = list(wanted["setup"])
    if resources.cpus_per_task:
        # srun does not take it from the job; libraries would start a thread for each core.
        environment.append(f"export SRUN_CPUS_PER_TASK={resources.cpus_per_task}")
        environment.append(
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{resources.cpus_per_task}}}"
        )
    return {
        "name": name,
        "comment": comment(submission.run_dir),
        "nodes": resources.node_range,
        "tasks_per_node": str(resources.tasks_per_node),
        "options": resources.options(),
        "directory": os.getcwd(),
        "log": f"{submission.folder.replace('%', '%%')}/job-%j.log",
        "signal_seconds": str(wanted["signal_seconds"]),
        "code": submission.code,
        "environment": environment,
        "python": submission.python,
        "submission": submission.folder,
    }


def comment(run_dir: str) -> str:
    """How squeue shows which run a job belongs to."""
    return f"llmtrain {run_dir}"


def save(config: dict, path: Path) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}
