"""What the cluster has, and whether a job fits: the mistakes that sbatch says badly, or never."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtrain.groups import did_you_mean
from llmtrain.slurm import cluster
from llmtrain.slurm.resources import Resources, seconds

FORMAT = "%P|%a|%l|%D|%c|%m|%G"
SIZES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Nodes of a partition that are alike; memory in MiB."""

    nodes: int
    cpus: int
    memory: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Partition:
    """limit: seconds of a job, None without limit."""

    name: str
    default: bool
    up: bool
    limit: int | None
    kinds: tuple[Kind, ...]


def read() -> list[Partition]:
    return parse(cluster.run(["sinfo", "--noheader", f"--format={FORMAT}"]))


def parse(text: str) -> list[Partition]:
    """Of `sinfo --noheader --format=<FORMAT>`: a line for each kind of node in a partition."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, up, limit, nodes, cpus, memory, gres = line.strip().split("|")
        kind = Kind(nodes=int(nodes), cpus=number(cpus), memory=number(memory), gpus=gpus(gres))
        plain = name.rstrip("*")
        kinds = found[plain].kinds if plain in found else ()
        found[plain] = Partition(
            name=plain,
            default=name.endswith("*"),
            up=up == "up",
            limit=seconds(limit),
            kinds=(*kinds, kind),
        )
    return list(found.values())


def number(text: str) -> int:
    """ "64" or "64+", the least of several kinds."""
    return int(text.rstrip("+"))


def gpus(gres: str) -> int:
    """GPUs of a node: "gpu:h100:8(S:0-1),nvme:1" -> 8."""
    without_sockets = re.sub(r"\([^)]*\)", "", gres)
    found = re.findall(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", without_sockets)
    return sum(map(int, found))


def check(resources: Resources, partitions: list[Partition]) -> None:
    """ValueError when no job of these resources can ever start."""
    names = [partition.name for partition in partitions]
    if resources.partition is None:
        chosen = [partition for partition in partitions if partition.default]
    else:
        wanted = resources.partition.split(",")
        for name in wanted:
            if name not in names:
                raise ValueError(
                    f"partition: got {name!r}, which the cluster does not have, expected one of "
                    f"{', '.join(names)}.{did_you_mean(name, names)}"
                )
        chosen = [partition for partition in partitions if partition.name in wanted]
    problems = [problem for one in chosen if (problem := misfit(resources, one))]
    if problems and len(problems) == len(chosen):
        raise ValueError(problems[0])


def misfit(resources: Resources, partition: Partition) -> str | None:
    """Why a partition cannot run the job; None when it can."""
    where = f"partition {partition.name}"
    if not partition.up:
        return f"partition: {where} takes no jobs now (it is down), expected another; see `sinfo`"
    limit = seconds(resources.time) if resources.time else None
    if limit and partition.limit and limit > partition.limit:
        return (
            f"time: got {resources.time}, expected at most {clock(partition.limit)}, the limit of "
            f"{where}; the job is requeued at its limit and goes on, so set time="
            f"{clock(partition.limit)}"
        )
    needs = {
        "gpus": (resources.gpus, "GPUs"),
        "cpus": (resources.tasks_per_node * (resources.cpus_per_task or 1), "CPUs"),
        "memory": (mebibytes(resources.mem), "MiB of memory"),
    }
    for key, (need, unit) in needs.items():
        most = max(getattr(kind, key) for kind in partition.kinds)
        if need > most:
            knob = {"gpus": "gpus", "cpus": "cpus_per_task or tasks_per_node", "memory": "mem"}[key]
            return (
                f"{knob}: got {need} {unit} a node, expected at most {most}, what nodes of {where} "
                f"have; lower it or choose another partition"
            )
    fitting = sum(
        kind.nodes
        for kind in partition.kinds
        if all(getattr(kind, key) >= need for key, (need, _) in needs.items())
    )
    if fitting < resources.nodes:
        return (
            f"nodes: got {resources.nodes}, expected at most {fitting}, the nodes of {where} that "
            "have what each needs; lower it, or choose another partition"
        )
    return None


def mebibytes(mem: str | None) -> float:
    """Memory as sbatch takes it: "64G", "2000" (MiB); 0, for all, needs nothing."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", mem or "0", re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"mem: got {mem!r}, expected a number of MiB or such as 64G; write mem=64G"
        )
    return int(match.group(1)) * SIZES[match.group(2).upper() or "M"]


def clock(total: int) -> str:
    """Seconds as Slurm writes them."""
    days, rest = divmod(total, 86400)
    time = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{time}" if days else time
