"""What workers wrote of their fragments, put together."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor


def whole(folder: Path, name: str) -> dict[tuple[str, str], Tensor]:
    """(kind, parameter) -> flattened tensor, put together from the fragments of all ranks."""
    pieces = defaultdict(list)
    for file in sorted(folder.glob(f"{name}-rank*.pt")):
        for kind, parameter, offset, tensor in torch.load(file):
            pieces[kind, parameter].append((offset, tensor))
    tensors = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = [offset + len(tensor) for offset, tensor in parts]
        assert [offset for offset, _ in parts] == [0, *ends[:-1]], key  # no gap, no overlap
        tensors[key] = torch.cat([tensor for _, tensor in parts])
    return tensors


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
