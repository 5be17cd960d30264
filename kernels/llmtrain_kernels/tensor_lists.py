"""Many tensors in one launch: their addresses and sizes in a table that the kernel reads.

A row a kind of tensor (parameters, gradients, ...), then `sizes`, then `first`: the number of the
first block of each. A program finds its tensor by counting how many begin no later than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # of addresses and sizes where four values are read at once
LARGEST = 512  # tensors of a launch


@dataclass(frozen=True, kw_only=True)
class Table:
    """entries: int64 [rows + 2, width] on the device, padded with tensors of no elements that no
    program finds. aligned: every address is a multiple of 16 bytes, every size one of 16. blocks:
    programs to launch."""

    entries: Tensor
    width: int
    aligned: bool
    blocks: int


def table(kinds: Sequence[Sequence[Tensor]], block: int) -> Table:
    """Of equally many tensors of each kind; sizes are those of the first kind. No waiting for the
    device. Captured in a CUDA graph, entries are arguments of launches, as many in one as fit: a
    copy from the host would be repeated from memory that is free by then."""
    sizes = [z.numel() for z in kinds[0]]
    width = 1 << max(0, len(sizes) - 1).bit_length()
    addresses = [[z.data_ptr() for z in tensors] for tensors in kinds]
    first, blocks = [], 0
    for size in sizes:
        first.append(blocks)
        blocks += -(-size // block)
    rows = [*addresses, sizes, first]
    padding = [0] * (width - len(sizes))
    beyond = [2**62] * len(padding)  # begins later than any program
    entries = [row + padding for row in rows[:-1]] + [first + beyond]
    return Table(
        entries=on_device(entries, kinds[0][0].device),
        width=width,
        aligned=all(a % ALIGNMENT == 0 for row in (*addresses, sizes) for a in row),
        blocks=blocks,
    )


def on_device(entries: list[list[int]], device: torch.device) -> Tensor:
    """The entries as int64."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        made = torch.zeros(len(entries), len(entries[0]), dtype=torch.int64, device=device)
        torch._foreach_add_(list(made.view(-1).unbind()), [n for row in entries for n in row])
        return made
    host = torch.tensor(entries, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def groups(*kinds: Sequence[Tensor]) -> list[tuple[Sequence[Tensor], ...]]:
    """The tensors launch by launch."""
    count = len(kinds[0])
    return [tuple(kind[i : i + LARGEST] for kind in kinds) for i in range(0, count, LARGEST)]


def check(operation: str, kinds: dict[str, Sequence[Tensor]], like: str) -> None:
    """ValueError unless every kind has as many tensors as `like`, of equal sizes, contiguous."""
    expected = [z.numel() for z in kinds[like]]
    for name, tensors in kinds.items():
        got = [z.numel() for z in tensors]
        if got != expected or not all(z.is_contiguous() for z in tensors):
            differ = [i for i, (a, b) in enumerate(zip(got, expected)) if a != b]
            raise ValueError(
                f"{operation}: got {len(got)} {name} for {len(expected)} {like}, of other sizes at "
                f"{differ[:5]}, expected as many, of equal sizes and contiguous; give them in the "
                f"order of {like}"
            )


def count_step(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Add 1 to every counter, or nothing when found_inf, read on the device, is not zero."""
    if found_inf is None:
        torch._foreach_add_(steps, 1)
    else:  # torch._foreach_add_ would read the tensor as a number and wait for the device
        applied = torch.where(found_inf > 0, 0.0, 1.0).reshape(())
        torch.ops.aten._foreach_add_.Tensor(steps, applied)
