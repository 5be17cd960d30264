"""`llmtrain launch`: check a training here, write its submission folder, and give it to Slurm."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from llmtrain import config as configuration
from llmtrain import groups, plan
from llmtrain.schema import TrainConfig
from llmtrain.slurm import cluster, partitions, queue, sweep
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.resources import Resources
from llmtrain.slurm.status import holder_of
from llmtrain.slurm.submission import Submission, note_job
from llmtrain.slurm.training import Training, with_device
from llmtrain.slurm.write import Link, write
from llmtrain.train.runlog import check_writable
from llmtrain.validate import READ_BY_PREP

# Variables of the shell that submits which would tell the ranks who they are.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launch(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> None:
    """Carry out one command line; prints the plan and the jobs."""
    typed = Typed.split(overrides)
    wanted = configuration.compose("launch", typed.launch, config_dirs=config_dirs)
    resources = Resources.of(wanted)
    check_chain(wanted["chain"], typed)
    rest = with_device(typed.train, resources)
    if not wanted["dry_run"]:
        check_cluster(resources)
    name, run_dir = name_and_place(rest, config_dirs)
    points = sweep.points(groups.parse(typed.sweep)) if typed.sweep else []
    trainings = [
        Training.check(
            configuration.compose("train", each, config_dirs=config_dirs),
            resources,
            corpus_comes="prep" in wanted["chain"],
        )
        for each in ([[*rest, *p.overrides, *place_of(name, run_dir, p)] for p in points] or [rest])
    ]
    check_writable(run_dir)
    links = chain_links(wanted, resources, typed, run_dir, config_dirs)
    with locked(run_dir):
        if not wanted["dry_run"]:
            jobs = queue.read()
            for training in trainings:
                check_unused(Path(os.path.abspath(training.config["run_dir"])), jobs)
        print(trainings[0].describe(rate(trainings[0], typed, config_dirs)), flush=True)
        for training in trainings if points else ():
            print(f"point       {training.brief()}")
        base = write(run_dir, name, trainings, wanted, links)
        print(f"submission  {base.folder}")
        submit(base, wanted)


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The overrides of a command line, by whom they are for, without their prefixes."""

    launch: list[str]
    train: list[str]
    sweep: list[str]
    prep: list[str]
    eval: list[str]
    plan: list[str]

    @classmethod
    def split(cls, overrides: Sequence[str]) -> Typed:
        """ValueError for a key that nobody has."""
        own = yaml.safe_load((groups.config_root() / "launch.yaml").read_text(encoding="utf-8"))
        found: dict[str, list[str]] = {name: [] for name in cls.__dataclass_fields__}
        for text, override in zip(overrides, groups.parse(overrides), strict=True):
            first, dot, _ = override.key_or_group.partition(".")
            if first in own:
                found["launch"].append(text)
            elif dot and first in ("prep", "eval"):
                found[first].append(text.removeprefix(f"{first}."))
            elif dot and first in ("sweep", "plan"):
                found[first].append(text)
            elif first in (names := [*TrainConfig.__annotations__, *groups.options()]):
                found["train"].append(text)
            else:
                raise ValueError(
                    f"{text}: neither `llmtrain launch` nor `llmtrain train` has a key {first!r}, "
                    f"expected one of {', '.join([*own, *names])}."
                    f"{groups.did_you_mean(first, [*own, *names])}"
                )
        return cls(**found)


def name_and_place(overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> tuple[str, Path]:
    """name and run_dir of the training, the latter absolute."""
    try:
        raw, _ = configuration.hydra_compose("train", overrides, config_dirs)
    except ValueError:
        configuration.compose("train", overrides, config_dirs=config_dirs)  # says it better
        raise
    return str(raw["name"]), Path(os.path.abspath(raw["run_dir"]))


def place_of(name: str, run_dir: Path, point: sweep.Point) -> list[str]:
    """What names the run of a point and its folder."""
    return [
        f"name={sweep.text(f'{name}-{point.name}')}",
        f"run_dir={sweep.text(str(run_dir / point.name))}",
    ]


def rate(training: Training, typed: Typed, config_dirs: Sequence[str | Path]) -> float | None:
    """Tokens per second for the estimate of hours: plan.tokens_per_second, or plan.device_name."""
    if not typed.plan:
        return None
    config = configuration.compose("plan", [*typed.train, *typed.plan], config_dirs=config_dirs)
    return plan.tokens_per_second(training.plan, config["plan"])


def check_chain(chain: list[str], typed: Typed) -> None:
    """A chain has the training, each link once, in order; what is typed for a link has it."""
    if "train" not in chain or chain != [link for link in queue.LINKS if link in chain]:
        raise ValueError(
            f"chain: got [{','.join(chain)}], expected the training and what goes before and after "
            "it; write chain=[prep,train,eval], or leave out prep or eval"
        )
    for link in ("prep", "eval"):
        texts = getattr(typed, link)
        if texts and link not in chain:
            raise ValueError(
                f"{link}.{texts[0]}: has no effect, {link} is not in chain=[{','.join(chain)}]; "
                "add it, or remove this"
            )
    if typed.sweep and chain != ["train"]:
        raise ValueError(
            f"chain: got [{','.join(chain)}] with a sweep, expected a chain or a sweep; run "
            "`llmtrain prep` before, and `llmtrain eval` with the runs after"
        )


def chain_links(
    wanted: dict,
    resources: Resources,
    typed: Typed,
    run_dir: Path,
    config_dirs: Sequence[str | Path],
) -> list[Link]:
    """The jobs beside the training, their configurations checked."""
    links = []
    if "prep" in wanted["chain"]:
        sections = [o.key_or_group.partition(".")[0] for o in groups.parse(typed.train)]
        read = [
            text
            for text, section in zip(typed.train, sections, strict=True)
            if section in READ_BY_PREP
        ]
        config = configuration.compose("prep", [*read, *typed.prep], config_dirs=config_dirs)
        cpus = resources.tasks_per_node * (resources.cpus_per_task or 1)
        one = replace(resources, nodes=1, min_nodes=1, gpus=0, tasks_per_node=1, cpus_per_task=cpus)
        links.append(Link(command="prep", config=config, resources=one))
    if "eval" in wanted["chain"]:
        where = f"checkpoint={sweep.text(str(run_dir))}"
        device = f"device={'cuda' if resources.gpus else 'cpu'}"
        config = configuration.compose(
            "eval", [where, device, *typed.eval], config_dirs=config_dirs
        )
        one = replace(resources, nodes=1, min_nodes=1)
        links.append(Link(command="eval", config=config, resources=one))
    return links


def check_cluster(resources: Resources) -> None:
    """ValueError when the cluster cannot run it."""
    partitions.check(resources, partitions.read())
    if resources.exclude:
        known = cluster.nodes_of(resources.partition)
        left = set(known) - set(cluster.expand(",".join(resources.exclude)))
        if len(left) < resources.nodes:
            raise ValueError(
                f"exclude: leaves {len(left)} of {len(known)} nodes, expected at least "
                f"nodes={resources.nodes}; change either"
            )


def check_unused(run_dir: Path, jobs: Sequence[queue.Queued]) -> None:
    """ValueError when a job of this run is there, or somebody trains in its folder without one."""
    queue.check_free(run_dir, jobs)
    holder = holder_of(run_dir, time.time())
    if holder and not holder.get("job"):
        raise ValueError(
            f"run_dir: {run_dir} is in use by pid {holder.get('pid')} on host "
            f"{holder.get('host')}, expected one training a run; wait for its end, or give this "
            "run another name=..."
        )


def submit(base: Submission, wanted: dict) -> None:
    """Give the jobs of a chain to Slurm, each after the one before; all of them or none."""
    files = {link: base.path / f"{link}.sbatch" for link in wanted["chain"]}
    files["train"] = base.path / "job.sbatch"
    if wanted["dry_run"]:
        for link in wanted["chain"]:
            print(f"dry_run: nothing submitted; by hand: sbatch {files[link]}")
        return
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    jobs: list[str] = []
    for link in wanted["chain"]:
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            job = cluster.submit(files[link], after, environment)
        except SlurmError:
            for earlier in jobs:
                cluster.run(["scancel", earlier])
            raise
        jobs.append(job)
        note_job(base, link, job)
        waits = f" after {jobs[-2]}" if after else ""
        print(f"job         {job} ({link}{waits})")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One submission of a run at a time, so that two do not both find the queue without it."""
    file = run_dir / "slurm" / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run_dir: {run_dir} is being submitted by another `llmtrain launch`, expected one "
                "at a time; wait for it"
            ) from error
        yield
