"""What a job asks Slurm for, and its options of sbatch."""

from __future__ import annotations

import re
from dataclasses import dataclass

TIMES = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+))?(?::(?P<day_seconds>\d+))?"
    r"|(?P<hours>\d+):(?P<hour_minutes>\d+):(?P<hour_seconds>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)
# Options that the template or a key of launch.yaml writes.
OURS = {
    "--nodes": "nodes",
    "-N": "nodes",
    "--ntasks": "tasks_per_node",
    "-n": "tasks_per_node",
    "--ntasks-per-node": "tasks_per_node",
    "--mincpus": "tasks_per_node",
    "--gpus": "gpus",
    "-G": "gpus",
    "--gpus-per-node": "gpus",
    "--gpus-per-task": "gpus",
    "--gres": "gpu_request",
    "--partition": "partition",
    "-p": "partition",
    "--account": "account",
    "-A": "account",
    "--qos": "qos",
    "-q": "qos",
    "--time": "time",
    "-t": "time",
    "--cpus-per-task": "cpus_per_task",
    "-c": "cpus_per_task",
    "--mem": "mem",
    "--constraint": "constraint",
    "-C": "constraint",
    "--exclude": "exclude",
    "-x": "exclude",
    "--signal": "signal_seconds",
    "--array": "sweep.<key>",
    "-a": "sweep.<key>",
    "--dependency": "chain",
    "-d": "chain",
    "--output": None,
    "-o": None,
    "--open-mode": None,
    "--requeue": None,
    "--no-requeue": None,
    "--job-name": "name",
    "-J": "name",
    "--comment": None,
    "--chdir": None,
    "-D": None,
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Nodes, and what is asked of each. gpus = 0: CPU ranks."""

    nodes: int
    min_nodes: int
    tasks_per_node: int
    gpus: int
    gpu_request: str
    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    cpus_per_task: int | None
    mem: str | None
    constraint: str | None
    exclude: tuple[str, ...]
    sbatch: tuple[str, ...]

    @classmethod
    def of(cls, launch: dict) -> Resources:
        """From the keys of launch.yaml, checked. ValueError for what cannot be."""
        nodes, gpus = launch["nodes"], launch["gpus"]
        least = nodes if launch["min_nodes"] is None else launch["min_nodes"]
        tasks = launch["tasks_per_node"] or gpus or 1
        for key in ("nodes", "min_nodes", "tasks_per_node", "cpus_per_task", "signal_seconds"):
            at_least(launch, key, 1)
        for key in ("gpus", "max_restarts"):
            at_least(launch, key, 0)
        if least > nodes:
            raise ValueError(
                f"min_nodes: got {least}, expected at most nodes={nodes}; change either"
            )
        if gpus and tasks != gpus:
            raise ValueError(
                f"tasks_per_node: got {tasks} with gpus={gpus}, expected one rank for each GPU; "
                "remove tasks_per_node (it is for CPU ranks)"
            )
        check_own(launch["sbatch"])
        return cls(
            nodes=nodes,
            min_nodes=least,
            tasks_per_node=tasks,
            gpus=gpus,
            gpu_request=launch["gpu_request"],
            partition=launch["partition"],
            account=launch["account"],
            qos=launch["qos"],
            time=checked_time(launch["time"], launch["signal_seconds"]),
            cpus_per_task=launch["cpus_per_task"],
            mem=None if launch["mem"] is None else str(launch["mem"]),
            constraint=launch["constraint"],
            exclude=tuple(launch["exclude"]),
            sbatch=tuple(launch["sbatch"]),
        )

    @property
    def sizes(self) -> list[int]:
        """The numbers of nodes a start may get, largest first."""
        return list(range(self.nodes, self.min_nodes - 1, -1))

    @property
    def node_range(self) -> str:
        """The value of sbatch's --nodes."""
        return str(self.nodes) if self.min_nodes == self.nodes else f"{self.min_nodes}-{self.nodes}"

    def options(self) -> list[str]:
        """The options that not every job has."""
        options = []
        if self.min_nodes == self.nodes:
            options.append(f"--ntasks-per-node={self.tasks_per_node}")
        else:
            # With tasks a node named, Slurm gives the least number of nodes, however many are free.
            options.append(f"--mincpus={self.tasks_per_node * (self.cpus_per_task or 1)}")
        if self.gpus:
            gres = self.gpu_request == "gres"
            options.append(f"--gres=gpu:{self.gpus}" if gres else f"--gpus-per-node={self.gpus}")
        for key in ("partition", "account", "qos", "time", "cpus_per_task", "mem", "constraint"):
            value = getattr(self, key)
            if value is not None:
                options.append(f"--{key.replace('_', '-')}={value}")
        if self.exclude:
            options.append(f"--exclude={','.join(self.exclude)}")
        return options + list(self.sbatch)


def at_least(launch: dict, key: str, least: int) -> None:
    value = launch[key]
    if value is not None and value < least:
        raise ValueError(
            f"{key}: got {value}, expected {least} or more; set {key} to such a number"
        )


def check_own(options: list[str]) -> None:
    """Further options of sbatch are options, and none that is written anyway."""
    for option in options:
        name = re.split(r"[= ]", option)[0]
        if not name.startswith("-") or "\n" in option:
            raise ValueError(
                f"sbatch: got {option!r}, expected an option such as --reservation=llm, one a list "
                "item; correct it"
            )
        if name in OURS:
            how = f"set {OURS[name]}=..." if OURS[name] else "it is always the same"
            raise ValueError(
                f"sbatch: {option!r} would be given twice, since `llmtrain launch` writes {name} "
                f"itself; remove it ({how})"
            )


def checked_time(time: int | str | None, signal_seconds: int) -> str | None:
    """A time limit in Slurm's notation. ValueError when it is none, or ends before the signal."""
    if time is None:
        return None
    limit = seconds(str(time))
    if limit is None:
        raise ValueError(
            f"time: got {time!r}, expected minutes, hours:minutes:seconds or days-hours:minutes:"
            "seconds; write time=12:00:00"
        )
    if limit <= signal_seconds:
        raise ValueError(
            f"signal_seconds: got {signal_seconds}, expected less than the limit time={time} "
            f"({limit} seconds), or the job stops as soon as it starts; change either"
        )
    return str(time)


def seconds(time: str) -> int | None:
    """A time limit as Slurm writes it, in seconds; None when it is no time, or without limit."""
    match = TIMES.fullmatch(time)
    if match is None:
        return None
    part = {name: int(text) for name, text in match.groupdict(default="0").items()}
    hours = 24 * part["days"] + part["day_hours"] + part["hours"]
    minutes = 60 * hours + part["day_minutes"] + part["hour_minutes"] + part["minutes"]
    return 60 * minutes + part["day_seconds"] + part["hour_seconds"] + part["seconds"]
