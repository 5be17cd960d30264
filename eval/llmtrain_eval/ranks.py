"""Data parallelism of an evaluation: each rank computes its share, every rank gets all results.

The work is cut into batches before it is shared out, so that a batch is the same whatever the
number of ranks, and so are the results. Without a process group there is one rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llmtrain.distributed import BACKENDS, choose_device, discover

T = TypeVar("T")


# Ranks wait for the one with the longest share, and for rank 0 while it counts n-grams.
TIMEOUT = timedelta(hours=2)


def device(name: str) -> torch.device:
    """This process's device for device = auto | cpu | cuda: the GPU of its local rank."""
    return choose_device(name, discover(dict(os.environ)), key="device")


def join(device: torch.device) -> bool:
    """Join the process group that RANK, WORLD_SIZE, ... describe. True when this call made it.

    NCCL for a CUDA device, gloo otherwise. Does nothing for a single process, and where a group
    exists already.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    cuda = device.type == "cuda"
    dist.init_process_group(
        BACKENDS[device.type], timeout=TIMEOUT, device_id=device if cuda else None
    )
    return True


def leave() -> None:
    """Leave the process group. Not a meeting point: a rank that failed must not wait."""
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this rank: every world_size-th."""
    return items[rank() :: world_size()]


def gather(part: T) -> list[T]:
    """The parts of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [part]
    parts: list[T] = [part] * world_size()
    dist.all_gather_object(parts, part)
    return parts
