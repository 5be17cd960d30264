"""Who am I: rank, ranks and device, whether started alone, by torchrun or by srun.

All three end in the same five environment variables, set before DeepSpeed looks for them (missing
ones make it search for MPI).
"""

from __future__ import annotations

import atexit
import os
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llmtrain.exits import RunFailed

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# The first step may compile for long while other ranks wait.
TIMEOUT = timedelta(minutes=30)
# A failed collective ends the process; the last collectives are remembered, for a hang's report.
NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


@dataclass(frozen=True, kw_only=True)
class World:
    """rank of size processes; local_rank of those on this machine."""

    rank: int
    size: int
    local_rank: int


def discover(environ: MutableMapping[str, str]) -> World:
    """The world of this process; fills in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    torchrun has set them; srun gives SLURM_* for each task; otherwise the process is alone.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank = int(environ.get("LOCAL_RANK", rank))
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        # Only srun's tasks have a step: the batch script itself has SLURM_NTASKS, but is alone.
        rank = int(environ["SLURM_PROCID"])
        size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
        local_rank = int(environ["SLURM_LOCALID"])
        if size > 1:
            nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
            environ.setdefault("MASTER_ADDR", first_host(nodes))
            environ.setdefault("MASTER_PORT", str(port_of_job(int(environ["SLURM_JOB_ID"]))))
    else:
        rank, size, local_rank = 0, 1, 0
    if size > 1 and "MASTER_ADDR" not in environ:
        raise ValueError(
            f"distributed: got WORLD_SIZE={size} but no MASTER_ADDR, expected the address of rank "
            "0; start the ranks with torchrun or srun, or set MASTER_ADDR and MASTER_PORT"
        )
    environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(free_port()))
    return World(rank=rank, size=size, local_rank=local_rank)


def first_host(nodelist: str) -> str:
    """The first node of a Slurm node list: "gpu[003-010,12],cpu1" -> "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ValueError(f"SLURM_JOB_NODELIST: got {nodelist!r}, expected node names")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def port_of_job(job_id: int) -> int:
    """A port that every task of a job agrees on and that jobs on one node seldom share.

    Below 32768, where Linux takes the ports of outgoing connections.
    """
    return 20000 + job_id % 12000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_device(name: str, world: World, *, key: str = "train.device") -> torch.device:
    """The device of this rank for auto | cpu | cuda; key: how the user names the knob."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{key}: got {name!r}, expected auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if world.local_rank >= found:
        raise ValueError(
            f"{key}=cuda: rank {world.rank} is number {world.local_rank} on its machine, "
            f"which shows {found} GPUs, expected one for each rank; start at most {found} ranks a "
            f"machine (and let each see all of its GPUs), or set {key}=cpu"
        )
    return torch.device("cuda", world.local_rank)


def start(world: World, device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Join the process group: NCCL between GPUs, gloo between CPU processes.

    timeout: of a collective; the watchdog (llmtrain.train.watchdog) reports a hang before it.

    It is left at the end of the process, not of a training: DeepSpeed keeps its first group.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    if device.type == "cuda":
        for name, value in NCCL.items():
            os.environ.setdefault(name, value)
        # torch's own monitor would end the process, without a report, before the watchdog does
        seconds = str(int(timeout.total_seconds()))
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", seconds)
    atexit.register(leave)  # without it ranks may abort at exit
    # A lone rank takes what port is free now: MASTER_PORT was free when it was chosen.
    alone = world.size == 1
    dist.init_process_group(
        BACKENDS[device.type],
        store=dist.TCPStore("127.0.0.1", 0, 1, is_master=True) if alone else None,
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def side_group(world: World, timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks beside the training's, for a thread of its own; gloo, so on the host.

    All ranks call it. None when there is one rank: gather_objects and broadcast_object take it.
    """
    if world.size == 1:
        return None
    try:
        return dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise RunFailed(
            f"distributed: rank {world.rank} ({socket.gethostname()}) could not be connected to "
            f"the other ranks by gloo, which saves in the background need: {error}; set "
            "GLOO_SOCKET_IFNAME to the network interface between the machines (see `ip address`), "
            "or train.async_save=false"
        ) from error


def leave_side_group(group: dist.ProcessGroup | None) -> None:
    """Close its connections: who still waits in it gets an error."""
    if group is not None:
        dist.destroy_process_group(group)


def gather_objects(value: object, world: World, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, in the order of ranks, on every rank."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: object, world: World, group: dist.ProcessGroup | None = None) -> object:
    """Rank 0's value on every rank."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def leave() -> None:
    """Leave the process group; it waits for nobody."""
    if dist.is_initialized():
        dist.destroy_process_group()
