"""Schedules: closed forms, ends, and what a run cannot have."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain import checkpoint
from llmtrain.config import compose
from llmtrain.train.branch import settle
from llmtrain.train.loop import train
from llmtrain.train.schedule import Constant, Cosine, Linear, WarmupStableDecay

COSINE = {"total_steps": 100, "warmup_fraction": 0.1, "warmup_steps": None, "min_ratio": 0.1}
WSD = {**COSINE, "min_ratio": 0.0, "decay_fraction": 0.2, "decay_shape": "sqrt"}
WSD |= {"decay_steps": None, "decay_from": None}


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


def test_linear_and_constant():
    schedule = Linear(**COSINE)
    assert schedule.ratio(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.ratio(99) == pytest.approx(0.1 + 0.9 / 90)
    schedule = Constant(**{name: COSINE[name] for name in COSINE if name != "min_ratio"})
    assert [schedule.ratio(step) for step in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]


def test_lengths_of_a_decay():
    fraction = WarmupStableDecay(**WSD)
    for knobs in ({"decay_fraction": None}, {"decay_fraction": None, "decay_steps": 20}):
        other = WarmupStableDecay(**{**WSD, **knobs})
        assert [other.ratio(s) for s in range(100)] == [fraction.ratio(s) for s in range(100)]
    branch = {**WSD, "decay_fraction": None, "decay_steps": 30, "decay_from": 70}
    ratios = [WarmupStableDecay(**branch).ratio(step) for step in range(100)]
    assert ratios[70] == 1.0 > ratios[71]


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
            r"decay: got 95 steps of decay, expected 0 .. 90 .*lower schedule.decay_fraction",
        ),
        (
            WarmupStableDecay,
            {"decay_shape": "square"},
            r"decay_shape: got 'square', expected one of linear, sqrt, cosine; fix schedule",
        ),
        (
            WarmupStableDecay,
            {"decay_steps": 10},
            r"decay_fraction=0.2, decay_steps=10: expected at most one .* set the other to null",
        ),
        (
            WarmupStableDecay,
            {"decay_from": 70},
            r"decay_from: got 70, but the last 20 of 100 steps begin after step 80",
        ),
    ],
)
def test_errors(kind, knobs, message):
    base = COSINE if kind is Cosine else WSD
    with pytest.raises(ValueError, match=message):
        kind(**{**base, **knobs})


def rates(run_dir: Path) -> dict[int, float]:
    """Step -> learning rate, from the ledger."""
    lines = map(json.loads, (run_dir / "ledger.jsonl").read_text().splitlines())
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


@pytest.fixture(scope="module")
def stable(corpus, small, tmp_path_factory) -> Path:
    """A run at a constant rate with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    more = ["schedule=constant", "train.total_tokens=1536", "train.save_every=2"]
    train(compose("train", [*corpus, *small, f"run_dir={folder}", *more, "train.keep=9"]))
    return folder


@pytest.fixture
def branch(corpus, small, tmp_path) -> Callable[..., dict]:
    """branch("run", ...) -> a configuration that does not say how long the run is."""
    sizes = [override for override in small if not override.startswith("train.total_tokens")]

    def make(name: str, *overrides: str) -> dict:
        return compose("train", [*corpus, *sizes, f"run_dir={tmp_path / name}", *overrides])

    return make


def test_decays_branch_off_two_checkpoints(stable, branch, caplog):
    caplog.set_level(logging.INFO, logger="llmtrain")
    wsd = ("schedule=wsd", "schedule.decay_from=resume")
    for step, steps in ((2, 3), (6, 4)):
        caplog.clear()
        start = f"train.resume={stable}/checkpoints/step-{step:08d}"
        config = branch(f"branch{step}", start, *wsd, f"schedule.decay_steps={steps}")
        assert train(config)["step"] == step + steps
        found = rates(Path(config["run_dir"]))
        assert sorted(found) == list(range(step + 1, step + steps + 1))
        shape = [1e-3 * (1 - math.sqrt(i / steps)) for i in range(steps)]
        assert list(found.values()) == pytest.approx(shape)
        told = [r.getMessage() for r in caplog.records if "learning rate" in r.getMessage()]
        both = f"1.0000e-03 at step {step}, the checkpoint's; 1.0000e-03 at step {step + 1}"
        assert told == [f"learning rate: {both}"]
    last = checkpoint.newest_good(Path(config["run_dir"]))
    trainer = json.loads((last / "trainer.json").read_text())
    assert trainer["lr_ratio"] == pytest.approx(1 - math.sqrt(3 / 4))


def test_a_jump_of_the_rate_is_told(stable, configure, caplog):
    start = f"train.resume={stable}/checkpoints/step-00000004"
    train(configure("jump", start, "schedule=linear", "train.total_tokens=1536"))
    (told,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "learning rate" in told
    assert "gives step 4 5.0000e-04, which was trained with 1.0000e-03" in told


def test_settle(stable, branch):
    start = f"train.resume={stable}/checkpoints/step-00000004"
    decay = ("schedule=wsd", "schedule.decay_steps=3")
    config = branch("settled", start, *decay, "schedule.decay_from=resume")
    settled = settle(config)
    assert settled["schedule"]["decay_from"] == 4
    assert settled["train"]["total_tokens"] == 7 * 256
    assert settle(branch("by_number", *decay, "schedule.decay_from=4"))["schedule"] == {
        **settled["schedule"]
    }
    plain = branch("plain", *decay)
    assert settle(plain) is plain


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.decay_from=4"], r"got 4, but not how long .* expected schedule.decay_steps"),
        (
            ["schedule.decay_from=resume", "schedule.decay_steps=3"],
            r"decay_from=resume: got train.resume=auto, expected the folder of a checkpoint",
        ),
        (
            ["schedule.decay_from=now", "schedule.decay_steps=3"],
            r"got 'now' and schedule.decay_steps=3, expected resume or a number",
        ),
        (
            ["schedule.decay_from=4", "schedule.decay_steps=3", "train.total_tokens=5120"],
            r"train.total_tokens=\d+: has no effect with schedule.decay_from",
        ),
    ],
)
def test_decays_that_cannot_branch_off(overrides, message):
    config = compose("train", ["schedule=wsd", *overrides])
    with pytest.raises(ValueError, match=message):
        settle(config)
