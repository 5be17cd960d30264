"""Which data a step reads when some is passed over."""

from __future__ import annotations

import pytest

from llmtrain.data.skips import DataSteps


@pytest.mark.parametrize(
    "skips",
    [
        [],
        [(0, 1)],
        [(3, 5), (5, 6), (9, 10)],
        [(9, 10), (2, 4), (3, 7)],
        [(1, 2), (3, 4), (0, 6)],
    ],
)
def test_the_steps_that_are_not_passed_over_in_order(skips):
    left = [d for d in range(40) if not any(first <= d < end for first, end in skips)]
    steps = DataSteps.of(skips)
    assert [steps.at(i) for i in range(30)] == left[:30]
    assert all(a[1] < b[0] for a, b in zip(steps.skips, steps.skips[1:]))


def test_passing_over_more():
    steps = DataSteps.of([(2, 4)])
    assert steps.passing_over(steps.at(3), steps.at(4) + 1).skips == ((2, 4), (5, 7))
    assert steps.passing_over(4, 6).skips == ((2, 6),)
    assert steps.skips == ((2, 4),)
