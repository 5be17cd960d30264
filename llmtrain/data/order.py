"""Which row of which source is sample i: the order of a token stream.

A sample is one row. Without weights every row of every source is read once an epoch, in a
permutation of its own each epoch. With weights the source of sample i is drawn by a hash of i, and
each source goes through epochs of its own, at its own pace. Both are pure functions of
(fingerprint, seed, i).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

import numpy as np

from llmtrain.data.permutation import Permutation, derive_key, hash64

BLOCK = 1 << 16  # samples between two remembered counts


class Order(Protocol):
    def rows(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source index [count], row of that source [count]) of consecutive samples."""
        ...


class EpochOrder:
    """All rows of all sources, permuted anew each epoch. rows_of: rows of each source."""

    def __init__(self, rows_of: list[int], *, fingerprint: str, seed: int):
        self.first_row = np.cumsum([0, *rows_of])
        self.total = int(self.first_row[-1])
        self.name = ("order", fingerprint, seed)

    def rows(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        samples_B = np.arange(first_sample, first_sample + count, dtype=np.int64)
        row_B = permuted(samples_B, self.total, self.name)
        source_B = np.searchsorted(self.first_row, row_B, side="right") - 1
        return source_B, row_B - self.first_row[source_B]


class WeightedOrder:
    """Sources drawn with probability proportional to weights [sources]."""

    def __init__(self, rows_of: list[int], weights: list[float], *, fingerprint: str, seed: int):
        self.rows_of = rows_of
        self.name = ("order", fingerprint, seed)
        self.key = derive_key("mix", fingerprint, seed)
        total = sum(map(Fraction, weights))
        shares = np.cumsum([Fraction(w) / total for w in weights])
        self.limits = np.array([int(share * (1 << 64)) for share in shares[:-1]], dtype=np.uint64)
        self._counts = [np.zeros(len(rows_of), dtype=np.int64)]  # before block 0, 1, 2, ..

    def rows(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        source_B = self.sources(first_sample, count)
        before = self.counts_before(first_sample)
        row_B = np.empty(count, dtype=np.int64)
        for source, rows in enumerate(self.rows_of):
            mine_B = source_B == source
            place_N = before[source] + np.arange(mine_B.sum(), dtype=np.int64)
            row_B[mine_B] = permuted(place_N, rows, (*self.name, source))
        return source_B, row_B

    def sources(self, first_sample: int, count: int) -> np.ndarray:
        """Source index [count] of consecutive samples."""
        samples_B = np.arange(first_sample, first_sample + count, dtype=np.uint64)
        return np.searchsorted(self.limits, hash64(self.key, samples_B), side="right")

    def counts_before(self, sample: int) -> np.ndarray:
        """How many samples below `sample` each source has had, [sources]."""
        block, rest = divmod(sample, BLOCK)
        while len(self._counts) <= block:
            first = (len(self._counts) - 1) * BLOCK
            self._counts.append(self._counts[-1] + self._count(first, BLOCK))
        return self._counts[block] + self._count(block * BLOCK, rest)

    def _count(self, first: int, count: int) -> np.ndarray:
        return np.bincount(self.sources(first, count), minlength=len(self.rows_of))


def permuted(place_N: np.ndarray, size: int, name: tuple[str | int, ...]) -> np.ndarray:
    """Element place % size of the permutation of epoch place // size, for each place [N]."""
    row_N = np.empty_like(place_N)
    epoch_N, index_N = np.divmod(place_N, size)
    for epoch in np.unique(epoch_N):
        here_N = epoch_N == epoch
        row_N[here_N] = Permutation(size, derive_key(*name, int(epoch)))(index_N[here_N])
    return row_N


def check_weights(weights: Mapping[str, float], sources: list[str]) -> list[float]:
    """The weights in the order of sources. Raises ValueError unless each has one above zero."""
    for name in weights:
        if name not in sources:
            raise ValueError(
                f"data.weights: unknown source {name!r}; the corpus has {', '.join(sources)}; "
                "remove it, or prepare the corpus with it in data.sources"
            )
    for name in sources:
        if name not in weights:
            raise ValueError(
                f"data.weights: source {name!r} has no weight and would never be read; expected "
                f"one for each of {', '.join(sources)}; give it one, or remove the source"
            )
        if not 0 < weights[name] < float("inf"):
            raise ValueError(
                f"data.weights.{name}={weights[name]}; expected a number above zero; set it, or "
                "remove the source from data.sources"
            )
    return [float(weights[name]) for name in sources]
