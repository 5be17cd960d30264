"""Which data an optimizer step reads, when some of it is passed over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSteps:
    """Step i (from 0) reads the i-th data step that is not passed over; data step d is the samples
    d G .. (d + 1) G - 1 of the order (G rows a step).

    skips: [first, end) of the data steps passed over, ascending, with gaps between.
    """

    skips: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, skips: Iterable[Iterable[int]]) -> DataSteps:
        """From any stretches [first, end), in any order."""
        steps = cls()
        for first, end in skips:
            steps = steps.passing_over(first, end)
        return steps

    def at(self, step: int) -> int:
        """The data step that this step reads."""
        for first, end in self.skips:
            if step < first:
                break
            step += end - first
        return step

    def passing_over(self, first: int, end: int) -> DataSteps:
        """These without the data steps first .. end - 1."""
        apart = []
        for other_first, other_end in self.skips:
            if other_end < first or end < other_first:
                apart.append((other_first, other_end))
            else:
                first, end = min(first, other_first), max(end, other_end)
        return DataSteps(skips=tuple(sorted([*apart, (first, end)])))
