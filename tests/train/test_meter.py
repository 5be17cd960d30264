"""Rates: what counts as a step's time, and what does not."""

from __future__ import annotations

import time

import pytest
import torch

from llmtrain.train.engine import Pending, StepResult
from llmtrain.train.guard import APPLIED
from llmtrain.train.meter import Meter

CPU = torch.device("cpu")


def result(seconds):
    return StepResult(
        loss=2.0,
        ce=1.5,
        grad_norm=0.5,
        tokens=10.0,
        text_bytes=30.0,
        code=APPLIED,
        stop=False,
        aux={},
        seconds=seconds,
    )


def meter():
    return Meter(step_tokens=10, flops=1.0, device=CPU, devices=1)


def test_first_steps_and_pauses_do_not_count():
    made = meter()
    made.pause(5.0)  # before the first step
    for seconds in (None, 0.25, 0.75, 3.25):
        made.waited += 0.125
        made.add(result(seconds))
    made.pause(3.0)
    values = made.take()
    assert values["step_seconds"] == pytest.approx((0.25 + 0.75 + 0.25) / 3)
    assert values["tokens_per_second"] == pytest.approx(30 / 1.25)
    assert values["data_wait_seconds"] == pytest.approx(0.125)
    assert (values["loss"], values["grad_norm"]) == (2.0, 0.5)
    made.add(result(None))  # after a load
    made.add(result(0.5))
    assert made.take()["step_seconds"] == 0.5
    assert made.overall()["tokens_per_second"] == pytest.approx(40 / 1.75)


def test_an_interval_of_a_first_step_has_no_rate():
    made = meter()
    made.add(result(None))
    values = made.take()
    assert values["loss"] == 2.0
    assert not {"step_seconds", "tokens_per_second"} & set(values)


def totals():
    return torch.tensor([20.0, 15.0, 10.0, 30.0, 0.5, APPLIED, 0.0], dtype=torch.float64)


def test_a_step_ends_where_its_result_is_made():
    """However late it is read."""
    before = None
    pending = []
    for _ in range(3):
        time.sleep(0.02)
        before = Pending(totals(), [], before=before)
        pending.append(before)
    time.sleep(0.2)
    found = [made.read().seconds for made in pending]
    assert found[0] is None
    assert all(0.02 <= seconds < 0.1 for seconds in found[1:])
    assert all(made.before is None for made in pending)  # no chain is kept


@pytest.mark.gpu
def test_on_a_gpu():
    """The device's time, which the host is ahead of."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x @ x
    torch.cuda.synchronize()
    before, pending = None, []
    began = time.perf_counter()
    for _ in range(3):
        for _ in range(20):
            x @ x
        before = Pending(totals().cuda(), [], before=before)
        pending.append(before)
    found = [made.read().seconds for made in pending]
    assert found[0] is None
    assert sum(found[1:]) == pytest.approx(2 / 3 * (time.perf_counter() - began), rel=0.3)
