"""Ranks that drift apart silently are found by comparing what all of them hold.

What every rank keeps a copy of must be the same everywhere, bit for bit: all weights
and buffers at ZeRO 0, 1 and 2; at stage 3 the small weights that stay on every rank, and buffers
(the others exist once, so there is nothing to compare them with, as there is not for the optimizer
state at stages 1 to 3). Each tensor gives a 64-bit number on its device,

    h = sum_i x_i w_i mod 2^64,    x_i: its bits as integers, w_i: odd, pseudo-random in i

which any single changed element changes (an odd factor loses nothing), an exchange of elements too,
and the order of summation does not. One all-gather carries these numbers and the host's counters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.distributed import World
from llmtrain.exits import RunFailed
from llmtrain.train.processes import Identity

GOLDEN = 0x9E3779B97F4A7C15
CHUNK = 1 << 21  # elements hashed at once: 16 MiB of int64
SHOWN = 3  # names of differing tensors
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def multipliers(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers without a pattern: the steps of splitmix64, Steele et al. 2014."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device) * signed(GOLDEN)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return (x ^ shifted(x, 31)) | 1


def shifted(x: Tensor, bits: int) -> Tensor:
    """int64 shifted to the right as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """The low 64 bits as int64 holds them."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def fingerprint(tensor: Tensor, weights: Tensor) -> Tensor:
    """The 64-bit number of a tensor's bits, an int64 scalar on its device.

    weights: multipliers, at least as many as a chunk has elements.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(INTEGERS[min(flat.element_size(), 4)])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for i, chunk in enumerate(bits.split(CHUNK)):
        part = (chunk.to(torch.int64) * weights[: len(chunk)]).sum()
        total += part * signed((2 * i + 1) * GOLDEN)
    return total


def number_of(text: str) -> int:
    """63 bits that stand for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers that every rank has whole. At ZeRO-3 those that stay gathered."""
    found = {
        name: p.data
        for name, p in module.named_parameters()
        if not hasattr(p, "ds_id") or p.ds_persist
    }
    return found | dict(module.named_buffers())


class Comparison:
    """Compares what must be equal on all ranks; every method is called by all of them together.

    config: of the run; corpus: its fingerprint.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        ranks: Sequence[Identity],
        *,
        config: dict,
        corpus: str,
    ):
        self.module, self.world, self.ranks = module, world, ranks
        config = {key: value for key, value in config.items() if key != "overrides"}
        self.constants = {
            "configuration": number_of(json.dumps(config, sort_keys=True)),
            "corpus": number_of(corpus),
        }
        self.compared_step: int | None = None

    def check(self, step: int, counters: Mapping[str, int]) -> None:
        """RunFailed on all ranks, naming who differs in what, unless all agree.

        counters: what the host counts.
        """
        counters = self.constants | counters
        tensors = replicated(self.module)
        names = [*counters, *tensors]
        numbers = self.gather(list(counters.values()), list(tensors.values()))
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, row in enumerate(numbers):
            groups.setdefault(tuple(row), []).append(rank)
        if len(groups) > 1:
            raise RunFailed(self.message(step, names, groups))
        self.compared_step = step

    def gather(self, counters: list[int], tensors: list[Tensor]) -> list[list[int]]:
        """Every rank's numbers."""
        device = tensors[0].device
        largest = min(CHUNK, max(t.numel() * max(1, t.element_size() // 4) for t in tensors))
        weights = multipliers(largest, device)
        own = torch.stack([fingerprint(tensor, weights) for tensor in tensors])
        own = torch.cat([torch.tensor(counters, dtype=torch.int64).to(device), own])
        rows = own.new_empty(self.world.size * len(own))
        dist.all_gather_into_tensor(rows, own)
        if rows.is_cuda:
            torch.cuda.current_stream().synchronize()  # a Python frame that the watchdog knows
        return rows.view(self.world.size, -1).tolist()

    def message(self, step: int, names: list[str], groups: dict[tuple[int, ...], list[int]]) -> str:
        """Who differs from whom, in what."""
        (right, most), *rest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[1]))
        majority = 2 * len(most) > self.world.size
        told = []
        for row, members in rest:
            differ = [name for name, a, b in zip(names, row, right, strict=True) if a != b]
            shown = ", ".join(differ[:SHOWN]) + (", ..." if len(differ) > SHOWN else "")
            who = ", ".join(str(self.ranks[rank]) for rank in members)
            told.append(f"{who} in {len(differ)} of {len(names)} tensors and counters: {shown}")
        others = ", ".join(str(rank) for rank in most)
        if majority:
            whose = f"these differ from most ranks ({others}): {'; '.join(told)}"
            advice = "Look at that machine's memory and GPU, or leave it out,"
        else:
            whose = f"no majority tells who is right; from ranks {others} differ: {'; '.join(told)}"
            advice = "Look at the machines' memory and GPUs,"
        return (
            f"health.compare_every: the ranks do not hold the same weights after step {step}; "
            f"{whose}. Nothing is saved of this state, checkpoints from before are untouched. "
            f"{advice} and start the same command again: it continues from the newest checkpoint, "
            "whose ranks agreed"
        )
