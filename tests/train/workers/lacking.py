"""A data order that never contained some data steps, without the code that passes over data."""

from __future__ import annotations

from collections.abc import Callable

from llmtrain.data.batch import Batch
from llmtrain.data.loader import TokenLoader


def lacking(data_steps: list[int], rows: int) -> Callable[[TokenLoader, int, int], Batch]:
    """A TokenLoader.batch of that order. rows: of a step."""
    real = TokenLoader.batch

    def batch(loader: TokenLoader, first_sample: int, count: int) -> Batch:
        step = first_sample // rows
        there = [d for d in range(step + len(data_steps) + 1) if d not in data_steps]
        return real(loader, first_sample + (there[step] - step) * rows, count)

    return batch
