"""The life of a training on a cluster, from one `llmtrain launch`: preempted, on a node that dies,
on fewer nodes, at its time limit; and nobody types anything in between."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint
from llmtrain.checkpoint import FragmentReader

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SAVE_EVERY = 20
# Sums over 2 ranks and over 1 differ in their last bits: 1.2e-7 in a weight, in runs of this test.
# One step moves weights by about the learning rate, 1e-3 to 1e-4; one batch out of order shows.
REDUCTION_NOISE = 1e-5


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter and moment of a checkpoint, flattened."""
    reader = FragmentReader(path)
    found = {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            shape = torch.Size(reader.manifest.parameters[name])
            found[f"{kind}|{name}"] = out = torch.empty(shape.numel())
            reader.read(kind, name, 0, out)
    return found


def saved(run_dir: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {step: tensors(path) for step, path in checkpoint.list_checkpoints(run_dir)}


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    weights = [key for key in one if key.startswith("param|")]
    return max((one[key] - two[key]).abs().max().item() for key in weights)


@pytest.fixture(scope="module")
def overrides(prepared, tiny) -> list[str]:
    return [*prepared, *tiny, f"train.save_every={SAVE_EVERY}", "train.keep=100"]


@pytest.fixture(scope="module")
def undisturbed(mini_slurm, overrides, tmp_path_factory) -> Path:
    """The run folder of the same training, on two nodes from the first step to the last."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    places = ("nodes=2", "partition=low", "preflight.enabled=false", f"run_dir={run_dir}")
    job = mini_slurm.launch(*places, *overrides)
    mini_slurm.wait_for(job, "COMPLETED", timeout=180)
    return run_dir


def test_story(slurm, overrides, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    places = ("nodes=2", "min_nodes=1", "partition=low", "time=60", "signal_seconds=600")
    job = slurm.launch(*places, f"run_dir={run_dir}", *overrides)

    # Two nodes, until a job of a higher partition takes all three for a moment.
    slurm.at_step(run_dir, SAVE_EVERY + 10)
    slurm.preempt()
    slurm.wait_for(job, "RUNNING", restarts=1)

    # Again two, until one dies; somebody else has the third, so that only one is left.
    others = slurm.submit("-p", "high", "-w", "n3", "--exclusive", script="#!/bin/sh\nsleep 600\n")
    slurm.wait_for(others, "RUNNING")
    slurm.at_step(run_dir, 3 * SAVE_EVERY + 10)
    slurm.kill_node("n2")
    slurm.wait_for(job, "RUNNING", restarts=2)

    # One node, until the signal that --signal sends before the time limit; then two to the end.
    slurm.until(lambda: len(slurm.starts(run_dir)) == 3, 60, "third start")
    slurm.at_step(run_dir, slurm.starts(run_dir)[-1]["resumed_step"] + SAVE_EVERY)
    slurm.run("scancel", str(others))
    slurm.run("scancel", "--batch", "--signal=USR2", str(job))
    slurm.wait_for(job, "COMPLETED", restarts=3, timeout=120)

    starts = slurm.starts(run_dir)
    assert [start["ranks"] for start in starts] == [2, 2, 1, 2]
    preempted, lost, signalled = (start["resumed_step"] for start in starts[1:])
    assert preempted >= SAVE_EVERY + 10  # saved on Slurm's TERM
    assert lost % SAVE_EVERY == 0  # nobody could save
    assert signalled >= lost + SAVE_EVERY
    check_course(run_dir, undisturbed, slurm, ranks_changed_at=lost)
    check_weights(run_dir, undisturbed, ranks_changed_at=lost)
    check_what_was_said(slurm, run_dir, job)


def check_course(run_dir: Path, undisturbed: Path, slurm, *, ranks_changed_at: int) -> None:
    """Every step once, on the same samples, with the same loss."""
    ledger, expected = (slurm.lines(run / "ledger.jsonl") for run in (run_dir, undisturbed))
    assert [line["step"] for line in ledger] == list(range(1, len(expected) + 1))
    for ours, theirs in zip(ledger, expected, strict=True):
        if ours["step"] <= ranks_changed_at:
            assert ours == theirs
        assert ours["samples"] == theirs["samples"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["applied"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    ends = [line["samples"][1] for line in ledger]
    assert [line["samples"][0] for line in ledger] == [0, *ends[:-1]]


def check_weights(run_dir: Path, undisturbed: Path, *, ranks_changed_at: int) -> None:
    """The same bits as long as there were two ranks, moments included, and nearly so afterwards."""
    ours, theirs = saved(run_dir), saved(undisturbed)
    assert ours.keys() >= theirs.keys()
    assert ranks_changed_at in theirs
    for step in theirs:
        assert ours[step].keys() == theirs[step].keys()
        assert distance(ours[step], theirs[step]) <= REDUCTION_NOISE, step
        if step <= ranks_changed_at:
            assert all(torch.equal(ours[step][key], theirs[step][key]) for key in ours[step]), step
    first, last = min(theirs), max(theirs)
    assert distance(theirs[first], theirs[last]) > 100 * REDUCTION_NOISE  # something was learned


def check_what_was_said(slurm, run_dir: Path, job: int) -> None:
    """decisions.jsonl, status and logs tell the story."""
    decisions = slurm.decisions(run_dir)
    assert [line["action"] for line in decisions] == ["wait", "wait", "requeue", "done"]
    assert "lost node n2" in decisions[1]["reason"]
    assert "stopped on a signal" in decisions[2]["reason"]
    (row,) = re.findall(rf".*{job}.*", slurm.run("llmtrain", "status", f"run_dir={run_dir}"))
    assert re.search(r"finished +(\d+)/\1 ", row)
    assert re.search(rf" 3 +{job} ", row)  # restarts
    logs = slurm.run("llmtrain", "logs", f"run_dir={run_dir}")
    told = [
        "start 0, nodes n1 n2",
        "start 1, nodes n1 n2",
        "start 2, nodes n1,",
        "start 3, nodes n1 n3",
        "done: finished",
    ]
    places = [logs.index(text) for text in told]
    assert places == sorted(places)
    assert {f"rank {rank} of 2 on n{rank + 1}" in logs for rank in (0, 1)} == {True}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_time_limit(slurm, prepared, tiny, tmp_path):
    """A training longer than its limit of two minutes: Slurm sends the signal at half of it."""
    run_dir = tmp_path / "run"
    longer = [key for key in tiny if "total_tokens" not in key]
    longer += ["train.total_tokens=960000", "train.save_every=10000"]  # 2500 steps
    typed = ("partition=low", "time=2", "signal_seconds=60", f"run_dir={run_dir}")
    job = slurm.launch(*typed, *prepared, *longer)
    done = slurm.wait_for(job, timeout=1100)

    assert done["JobState"] == "COMPLETED"
    starts, decisions = slurm.starts(run_dir), slurm.decisions(run_dir)
    assert len(starts) == int(done["Restarts"]) + 1 >= 2
    assert {line["cause"] for line in decisions[:-1]} == {"stopped"}
    assert {line["action"] for line in decisions[:-1]} == {"requeue"}
    assert [start["resumed_step"] for start in starts[1:]] == [d["step"] for d in decisions[:-1]]
    assert slurm.steps(run_dir) == list(range(1, 2501))
    assert "TIMEOUT" not in slurm.output(job)
