"""Rows for this rank: how many at once, and the fixed set of held-out rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from llmtrain.data.batch import MicroBatch
from llmtrain.data.loader import TokenLoader
from llmtrain.distributed import World
from llmtrain.plan import Plan

log = logging.getLogger(__name__)

# Share of a device's memory that the estimate may fill; the rest is fragmentation and error.
MEMORY_SHARE = {"cuda": 0.8, "cpu": 0.5}
# More tokens at once only leave the processor's caches.
CPU_TOKENS = 4096


def choose_micro_batch(given: int | None, plan: Plan, stage: int, device: torch.device) -> int:
    """Rows a rank computes at once: the given number, or the largest divisor that should fit.

    plan: of one row at once, so the rows of a step divide among the ranks. ValueError when those
    of a rank do not divide into micro-batches.
    """
    rows = plan.rows // plan.ranks
    if given is not None:
        if rows % given:
            raise ValueError(
                f"train.micro_batch: got {given}, expected a divisor of the {rows} rows that each "
                f"of {plan.ranks} ranks has in a step; change it or set train.micro_batch=null"
            )
        return given
    budget = MEMORY_SHARE[device.type] * device_memory(device)
    one = plan.memory[stage].total
    fitting = [
        divisor
        for divisor in range(1, rows + 1)
        if rows % divisor == 0
        and one + (divisor - 1) * plan.row_bytes <= budget
        and (device.type == "cuda" or divisor * plan.seq_len <= CPU_TOKENS)
    ]
    if one > budget:
        log.warning(
            "train.micro_batch=null: one row is estimated at %.1f GiB, more than the %.1f GiB that "
            "should be used; trying it anyway",
            one / 2**30,
            budget / 2**30,
        )
    return max(fitting, default=1)


def device_memory(device: torch.device) -> int:
    """Bytes of memory for this rank."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class HeldOut:
    """The same held-out rows at every validation, divided among the ranks.

    tokens: at most that many, but one row at least. Every rank gets equally many batches, as ZeRO-3
    needs; rows beyond the end weigh nothing.
    """

    def __init__(
        self,
        loader: TokenLoader,
        *,
        tokens: int,
        seq_len: int,
        micro_rows: int,
        world: World,
        mask_documents: bool,
        device: torch.device,
    ):
        self.loader, self.world, self.micro_rows = loader, world, micro_rows
        self.mask_documents, self.device = mask_documents, device
        self.rows = max(1, min(tokens // seq_len, loader.rows_per_epoch))

    def __iter__(self) -> Iterator[MicroBatch]:
        for start in range(0, self.rows, self.world.size * self.micro_rows):
            first = start + self.world.rank * self.micro_rows
            batch = self.loader.batch(first, self.micro_rows)
            beyond_B = first + torch.arange(self.micro_rows) >= self.rows
            batch = replace(batch, weights_BT=batch.weights_BT.masked_fill(beyond_B[:, None], 0.0))
            yield MicroBatch.of(batch, mask_documents=self.mask_documents).to(self.device)
