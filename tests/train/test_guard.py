"""The guard alone: limits, what is seen as a spike, when to go back, what a checkpoint keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from llmtrain.exits import RunFailed
from llmtrain.train.engine import verdict
from llmtrain.train.guard import (
    APPLIED,
    GRADIENT_NOT_FINITE,
    LAG,
    LOSS_NOT_FINITE,
    LOSS_SPIKE,
    NO_LIMITS,
    NORM_SPIKE,
    Guard,
    Knobs,
    Limits,
    limit,
)

KNOBS = {
    "window": 4,
    "warmup_steps": 6,
    "loss_spike": 5.0,
    "norm_spike": None,
    "max_skipped": 3,
    "rollback_after": None,
    "rollback_window": 10,
    "max_rollbacks": 2,
}
DEFAULTS = yaml.safe_load((Path(__file__).parents[2] / "configs" / "train.yaml").read_text())
DEFAULTS = {key: value for key, value in DEFAULTS["guard"].items() if key != "inject"}


def guard(**changes: object) -> Guard:
    return Guard(Knobs(**{**KNOBS, **changes}))


def feed(subject: Guard, losses: list[float], first: int = 1) -> list[str | None]:
    """Make these steps, with the limits that the guard gives; the reasons of the skips."""
    reasons = []
    for step, loss in enumerate(losses, start=first):
        limits = subject.limits(step)
        code = LOSS_SPIKE if loss > limits.loss else APPLIED
        code = code if math.isfinite(loss) else LOSS_NOT_FINITE
        reasons.append(subject.saw(step, code, loss, 1.0, limits))
    return reasons


def test_limit_is_median_plus_robust_deviations():
    values = [3.0, 1.0, 2.0, 100.0, 4.0]  # median 3, deviations 0 2 1 97 1, their median 1
    assert limit(values, 5.0, 0.02) == pytest.approx(3 + 5 * 1.4826)
    assert limit([2.0] * 8, 5.0, 0.02) == pytest.approx(2 * (1 + 5 * 1.4826 * 0.02))
    assert limit([0.0] * 8, 5.0, 0.02, 0.02) == pytest.approx(5 * 1.4826 * 0.02)


def test_limits_wait_for_a_full_window_and_the_warmup():
    """And come from steps that a GPU has finished: of step s, those up to s - LAG."""
    subject = guard()
    for step in range(1, 6 + LAG):
        assert subject.limits(step) == NO_LIMITS
        subject.saw(step, APPLIED, float(step), 1.0, NO_LIMITS)
    assert subject.limits(6 + LAG).loss == limit([3.0, 4.0, 5.0, 6.0], 5.0, 0.02)
    assert subject.limits(6 + LAG).grad_norm == math.inf
    subject.saw(6 + LAG, APPLIED, 900.0, 1.0, NO_LIMITS)
    assert subject.limits(7 + LAG).loss == limit([4.0, 5.0, 6.0, 7.0], 5.0, 0.02)
    assert guard(window=7, warmup_steps=0).limits(3) == NO_LIMITS
    norms = guard(loss_spike=None, norm_spike=2.0)
    for step in range(1, 9):
        norms.saw(step, APPLIED, 1.0, float(step), NO_LIMITS)
    assert norms.limits(9) == Limits(grad_norm=limit([4.0, 5.0, 6.0, 7.0], 2.0, 0.05))


def test_a_spike_is_seen_once_and_leaves_no_trace_in_the_limits():
    reasons = feed(subject := guard(), [2.0, 2.1, 1.9, 2.0, 2.05, 2.1, 1.95, 2.0, 9.0, 2.0])
    assert [reason is None for reason in reasons] == [True] * 8 + [False, True]
    assert reasons[8] == f"loss spike: 9 > {limit([2.0, 2.05, 2.1, 1.95], 5, 0.02):.6g}"
    assert all(entry.loss < 3 for entry in subject.window)
    assert (subject.applied, subject.skipped) == (9, 1)


@pytest.mark.parametrize("seed", range(4))
def test_no_false_alarm_on_healthy_curves(seed):
    """The defaults on losses as of a training: a power law, noise, heavier noise early, lumps."""
    draw, steps = np.random.default_rng(seed), 6000
    at = np.arange(1, steps + 1)
    noise = draw.standard_t(4, steps) * (0.02 + 0.06 * np.exp(-at / 500))
    lumps = np.convolve(draw.normal(0, 0.02, steps), np.ones(20) / 4, mode="same")
    losses = 2.0 + 9.0 * at**-0.35 + noise + lumps
    subject = Guard(Knobs(**DEFAULTS))
    assert set(feed(subject, losses.tolist())) == {None}
    later = losses.copy()
    later[4000] *= 1.6
    found = feed(Guard(Knobs(**DEFAULTS)), later.tolist())
    assert [i for i, reason in enumerate(found) if reason is not None] == [4000]


def test_verdict():
    limits = Limits(loss=3.0, grad_norm=5.0)

    def seen(loss: float, norm: float) -> int:
        loss, norm = (torch.tensor(value, dtype=torch.float64) for value in (loss, norm))
        return int(verdict(loss, loss, norm, limits))

    assert seen(3.0, 5.0) == APPLIED
    assert seen(3.1, 4.0) == LOSS_SPIKE
    assert seen(2.0, 5.1) == NORM_SPIKE
    assert seen(3.1, 5.1) == LOSS_SPIKE
    assert seen(2.0, math.nan) == seen(2.0, math.inf) == GRADIENT_NOT_FINITE
    assert seen(math.nan, math.nan) == seen(math.inf, 1.0) == LOSS_NOT_FINITE


def test_going_back_needs_several_skips_in_a_window():
    subject = guard(rollback_after=3, rollback_window=5, warmup_steps=99)
    nan = math.nan
    feed(subject, [2.0, nan, 2.0, 2.0, nan, 2.0, nan])
    assert (subject.suspect, subject.stretch) == (5, [])
    feed(subject, [2.0, nan], first=8)
    assert [skip.step for skip in subject.stretch] == [5, 7, 9]
    feed(subject, [2.0], first=10)
    assert (subject.suspect, subject.stretch) == (7, [])
    feed(never := guard(), [nan] * 9)
    assert (never.suspect, never.stretch) == (None, [])


def test_too_many_skips_in_a_row_end_the_run():
    subject = guard()
    for step, loss in enumerate([math.nan, math.nan, 2.0, math.nan, math.nan], start=1):
        feed(subject, [loss], first=step)
        subject.check(step)
    feed(subject, [math.nan], first=6)
    with pytest.raises(
        RunFailed,
        match=r"last 3 steps \(up to step 6\) were skipped; the last one: loss not finite; "
        r"expected fewer than guard.max_skipped=3\. Weights are as after step 3\.",
    ):
        subject.check(6)


def test_a_checkpoint_continues_the_guard_exactly():
    draw = np.random.default_rng(1)
    losses = (2 + draw.normal(0, 0.1, 60)).tolist()
    losses[20] = losses[33] = math.nan
    losses[40] = 50.0
    whole, first = (guard(rollback_after=9, rollback_window=20) for _ in range(2))
    expected = feed(whole, losses)
    seen = feed(first, losses[:34])
    second = guard(rollback_after=9, rollback_window=20)
    second.load(json.loads(json.dumps(first.state())))
    assert second.limits(35) == first.limits(35)
    assert seen + feed(second, losses[34:], first=35) == expected
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("window", 3, "expected at least 4"),
        ("warmup_steps", -1, "expected at least 0"),
        (
            "loss_spike",
            0.0,
            "expected more than 0, or null for no limit; set guard.loss_spike=null",
        ),
        ("norm_spike", -2.0, "expected more than 0"),
        ("max_skipped", 0, "expected at least 1"),
        ("rollback_after", 0, "expected at least 1"),
        ("max_rollbacks", 0, "expected at least 1"),
    ],
)
def test_knobs_that_make_no_sense(knob, value, says):
    with pytest.raises(ValueError, match=rf"guard.{knob}: got {value}, {says}"):
        guard(**{knob: value})


def test_a_rollback_needs_room_in_its_window():
    with pytest.raises(ValueError, match=r"guard.rollback_window: got 10, expected at least 11"):
        guard(rollback_after=11)
