"""Schedules: closed forms, ends, and what a run cannot have."""

from __future__ import annotations

import itertools
import math

import pytest

from llmtrain.train.schedule import Cosine, WarmupStableDecay

COSINE = {"total_steps": 100, "warmup_fraction": 0.1, "warmup_steps": None, "min_ratio": 0.1}
WSD = {**COSINE, "min_ratio": 0.0, "decay_fraction": 0.2, "decay_shape": "sqrt"}


def test_cosine():
    schedule = Cosine(**COSINE)
    ratios = [schedule.ratio(step) for step in range(100)]
    assert ratios[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert ratios[10] == 1.0
    assert ratios[55] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert all(a > b for a, b in itertools.pairwise(ratios[10:]))
    assert ratios[99] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 89 / 90)))
    assert schedule.ratio(500) == ratios[99]  # beyond the end: as at the end


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)]
)
def test_warmup_stable_decay(shape, middle):
    schedule = WarmupStableDecay(**{**WSD, "decay_shape": shape})
    assert {schedule.ratio(step) for step in range(9, 81)} == {1.0}
    assert schedule.ratio(90) == pytest.approx(middle)
    assert 0 < schedule.ratio(99) < 0.06


def test_warmup_steps_and_no_warmup():
    assert Cosine(**{**COSINE, "warmup_fraction": None, "warmup_steps": 4}).ratio(1) == 0.5
    assert Cosine(**{**COSINE, "warmup_fraction": 0.0}).ratio(0) == 1.0
    assert Cosine(**{**COSINE, "total_steps": 1, "warmup_fraction": 1.0}).ratio(0) == 1.0


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (Cosine, {"warmup_steps": 5}, r"warmup_fraction=0.1, warmup_steps=5: expected exactly one"),
        (Cosine, {"warmup_fraction": None}, r"expected exactly one .* set the other to null"),
        (
            Cosine,
            {"min_ratio": 2.0},
            r"min_ratio: got 2.0, expected 0 .. 1; fix schedule.min_ratio",
        ),
        (
            Cosine,
            {"warmup_fraction": None, "warmup_steps": 200},
            r"warmup: got 200 steps, expected 0 .. 100 .* lower schedule.warmup_steps",
        ),
        (
            WarmupStableDecay,
            {"decay_fraction": 0.95},
            r"decay_fraction=0.95: got 95 steps of decay, expected 0 .. 90 .*lower schedule.decay",
        ),
        (
            WarmupStableDecay,
            {"decay_shape": "square"},
            r"decay_shape: got 'square', expected one of linear, sqrt, cosine; fix schedule",
        ),
    ],
)
def test_errors(kind, knobs, message):
    base = COSINE if kind is Cosine else WSD
    with pytest.raises(ValueError, match=message):
        kind(**{**base, **knobs})
