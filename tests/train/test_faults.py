"""Faults on purpose: their texts, what they do to a step, and that they act once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llmtrain.train.faults import Fault, Faults, acted, check

RUN = {"ranks": 2, "steps": 50, "stage": 1}


def planned(tmp_path: Path, *texts: str, rank: int = 0) -> Faults:
    return Faults(check(texts, run_dir=tmp_path, **RUN), rank=rank, run_dir=tmp_path)


def test_texts():
    fault = Fault.parse("slow@10-40:rank1:x2.5")
    assert (fault.kind, fault.first, fault.last, fault.rank, fault.factor) == (
        "slow",
        10,
        40,
        1,
        2.5,
    )
    fault = Fault.parse("nan_loss@12")
    assert (fault.first, fault.last, fault.rank, fault.factor) == (12, 12, None, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nan_weights@12", "expected a fault such as nan_gradient@12, nan_loss@12"),
        ("nan_loss", "expected a fault such as"),
        (
            "nan_loss@12:x3",
            "with a factor that it does not take; expected nan_loss as in 'nan_loss@12'",
        ),
        ("nan_loss@12:rank1", "with a rank that"),
        ("loss_spike@20", "with no factor"),
        ("hang@30", "with no rank; expected hang as in 'hang@30:rank1'"),
        ("kill@3-5:rank0", "with several steps"),
        ("nan_loss@0", r"the steps 0 .. 0, which do not count up from 1"),
        ("slow@9-4:rank0:x2", r"the steps 9 .. 4"),
        ("hang@30:rank2", r"names rank 2, expected one of 0 .. 1; change it or start more ranks"),
        ("hang@51:rank1", "has no effect, the run has 50 steps"),
    ],
)
def test_texts_that_name_no_fault(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"guard.inject.*{says}"):
        check([text], run_dir=tmp_path, **RUN)


def test_a_flipped_weight_needs_copies(tmp_path):
    with pytest.raises(ValueError, match=r"each weight has one copy only.*deepspeed=zero0"):
        check(["flip_weight@3:rank0"], run_dir=tmp_path, **{**RUN, "stage": 3})


def test_factors_of_a_data_step(tmp_path):
    faults = planned(tmp_path, "nan_gradient@3", "loss_spike@5-6:x50", "norm_spike@6:x2")
    spoiled = {step: faults.spoil(step - 1) for step in range(1, 8)}
    assert spoiled[3].loss == 1.0
    assert math.isnan(spoiled[3].gradient)
    assert (spoiled[5].loss, spoiled[5].gradient) == (50.0, 50.0)
    assert (spoiled[6].loss, spoiled[6].gradient) == (50.0, 100.0)
    assert all(spoiled[step].gradient == 1.0 for step in (1, 2, 4, 7))
    assert faults.starting(9, 4) == ["loss_spike@5-6:x50"]  # step 9 reads data step 4


def test_faults_of_a_rank_act_once(tmp_path):
    module = torch.nn.Linear(4, 4)
    before = module.weight.detach().clone()
    for rank in (0, 1):
        planned(tmp_path, "flip_weight@7:rank1", rank=rank).after(6, module)
    planned(tmp_path, "flip_weight@7:rank1", rank=0).after(7, module)
    assert torch.equal(module.weight, before)
    planned(tmp_path, "flip_weight@7:rank1", rank=1).after(7, module)
    changed = (module.weight != before).nonzero().tolist()
    assert changed == [[0, 0]]
    assert acted(tmp_path) == {"flip_weight@7:rank1"}
    before = module.weight.detach().clone()
    again = planned(tmp_path, "flip_weight@7:rank1", rank=1)
    again.after(7, module)
    assert torch.equal(module.weight, before)
    assert again.starting(7, 6) == []
    check(["flip_weight@7:rank1"], run_dir=tmp_path, **{**RUN, "ranks": 1})


@pytest.mark.slow
def test_faults_of_ranks(workers, corpus, small, tmp_path):
    """One bit of one copy, a slow rank, and a rank that is killed; see the worker."""
    said = workers("faults_worker.py", 2, tmp_path, *corpus, *small, ok=False)
    assert "Signal 9 (SIGKILL)" in said
    first, second = (torch.load(tmp_path / f"weights-rank{rank}.pt") for rank in (0, 1))
    differ = {name: (first[name] != second[name]).nonzero().tolist() for name in first}
    assert [place for places in differ.values() for place in places] == [[0, 0]]
    for rank in (0, 1):
        slow, fast = map(float, (tmp_path / f"seconds-rank{rank}.txt").read_text().split())
        assert slow > 2 * fast
    lines = (tmp_path / "kill" / "ledger.jsonl").read_text().splitlines()
    ledger = [json.loads(line) for line in lines]
    assert [line["step"] for line in ledger if "event" not in line] == list(range(1, 8))
    assert [line for line in ledger if "event" in line] == [
        {"event": "fault", "step": 8, "course": 0, "fault": "kill@8:rank1"}
    ]
    assert acted(tmp_path / "kill") == {"kill@8:rank1"}
