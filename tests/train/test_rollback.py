"""Whole trainings that go wrong: skipped steps and rollbacks, against runs without the trouble."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint, cli, exits
from llmtrain.checkpoint import FragmentReader
from llmtrain.data.loader import TokenLoader
from llmtrain.exits import RunFailed
from llmtrain.manifest import hash_file, read_manifest
from llmtrain.train.engine import Engine
from llmtrain.train.loop import train
from llmtrain.train.runlog import RunLog

STEPS, ROWS = 12, 8
LACKING = Path(__file__).parent / "workers" / "lacking.py"
# A constant learning rate: the n-th applied step is the same, however many were skipped before.
STEADY = ("schedule.warmup_fraction=null", "schedule.warmup_steps=0", "schedule.min_ratio=1.0")
WATCHFUL = (
    "guard.window=4",
    "guard.warmup_steps=4",
    "guard.rollback_after=2",
    "guard.rollback_window=2",
    "train.keep=9",
)
BAD = "guard.inject=[nan_gradient@3,loss_spike@7:x50,nan_loss@9-10]"


def lacking(data_steps: list[int]) -> Callable:
    spec = importlib.util.spec_from_file_location("lacking", LACKING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.lacking(data_steps, ROWS)


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def steps(run_dir: Path, course: int | None = None) -> list[dict]:
    """The ledger's lines of steps, of one course or all."""
    found = [line for line in lines(run_dir, "ledger") if "event" not in line]
    return [line for line in found if course in (None, line["course"])]


def rollbacks(run_dir: Path) -> list[dict]:
    return [line for line in lines(run_dir, "ledger") if line.get("event") == "rollback"]


def at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and moment of a checkpoint, flattened."""
    reader = FragmentReader(path)
    found = {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            shape = torch.Size(reader.manifest.parameters[name])
            found[f"{kind}|{name}"] = out = torch.empty(shape.numel())
            reader.read(kind, name, 0, out)
    return found


def same(first: Path, second: Path) -> bool:
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def trainer(path: Path) -> dict:
    return json.loads((path / "trainer.json").read_text())


@pytest.fixture(scope="module")
def make(corpus, small, tmp_path_factory) -> Callable[..., dict]:
    from llmtrain.config import compose

    folder = tmp_path_factory.mktemp("runs")

    def configure(name: str, *overrides: str) -> dict:
        fixed = [*corpus, *small, *STEADY, f"run_dir={folder / name}"]
        return compose("train", [*fixed, *overrides])

    configure.folder = folder
    return configure


@pytest.fixture(scope="module")
def bad(make) -> Path:
    """The run folder of a run that skipped steps 3 and 7, went back once and finished."""
    summary = train(make("bad", *WATCHFUL, BAD))
    assert (summary["finished"], summary["rollbacks"]) == (True, 1)
    return make.folder / "bad"


def test_the_ledger_tells_what_happened(bad, capsys):
    (event,) = rollbacks(bad)
    assert (event["from_step"], event["to_step"], event["course"]) == (10, 5, 1)
    assert (event["data_steps"], event["samples"]) == ([8, 10], [64, 80])
    assert event["reason"] == (
        "2 of the steps 9 .. 10 skipped, the first: loss not finite, the last: loss not finite"
    )
    assert event["checkpoint"] == str(at(bad, 5))
    first, second = steps(bad, 0), steps(bad, 1)
    assert [line["step"] for line in first] == list(range(1, 11))
    assert [line["step"] for line in second] == list(range(6, STEPS + 1))
    reasons = {line["step"]: line["reason"] for line in first if not line["applied"]}
    assert reasons.keys() == {3, 7, 9, 10}
    assert reasons[3] == "gradient not finite"
    assert reasons[7].startswith("loss spike: ")
    value, above = map(float, reasons[7].removeprefix("loss spike: ").split(" > "))
    assert value == pytest.approx(first[6]["loss"], rel=1e-5)
    assert value > above > first[5]["loss"]
    assert [line["samples"][0] // ROWS for line in second] == [5, 6, 7, 10, 11, 12, 13]
    assert [line["applied"] for line in second] == [True, False] + [True] * 5
    strip = {"course": 0}
    assert [{**line, **strip} for line in second[:3]] == first[5:8]
    faults = [line["fault"] for line in lines(bad, "ledger") if line.get("event") == "fault"]
    spike, nan = "loss_spike@7:x50", "nan_loss@9-10"
    assert faults == ["nan_gradient@3", spike, nan, nan, spike]


def test_metrics_and_checkpoints_of_a_rollback(bad):
    metrics = [line for line in lines(bad, "metrics") if line["kind"] == "train"]
    assert [(line["step"], line["course"]) for line in metrics] == [(4, 0), (8, 0), (8, 1), (12, 1)]
    assert [line["guard/skipped"] for line in metrics] == [1, 2, 2, 2]
    assert [line["guard/rollbacks"] for line in metrics] == [0, 0, 1, 1]
    assert metrics[1]["guard/loss_limit"] == metrics[2]["guard/loss_limit"]
    assert [step for step, _ in checkpoint.list_checkpoints(bad)] == [5, 10, 12]
    kept = trainer(at(bad, 10))
    assert (kept["course"], kept["data_skips"], kept["next_sample"]) == (1, [[8, 10]], 12 * ROWS)
    assert (kept["skipped"], kept["optimizer_steps"]) == (2, 8)


def test_trouble_leaves_no_trace(bad, make, monkeypatch):
    """As a run on an order that never had the data which was skipped or passed over."""
    monkeypatch.setattr(TokenLoader, "batch", lacking([2, 6, 8, 9]))
    train(make("lacking", f"train.total_tokens={(STEPS - 2) * 256}"))
    last = at(make.folder / "lacking", STEPS - 2)
    assert same(at(bad, STEPS), last)
    assert trainer(at(bad, STEPS))["optimizer_steps"] == trainer(last)["optimizer_steps"] == 10
    losses = [line["loss"] for line in steps(make.folder / "lacking")]
    applied = [line["loss"] for line in steps(bad, 0)[:5] + steps(bad, 1) if line["applied"]]
    assert applied == losses


def test_as_continued_by_hand(bad, make):
    """From the same checkpoint, told which data to pass over."""
    by_hand = make.folder / "by_hand" / "source"
    shutil.copytree(at(bad, 5), by_hand)
    file, manifest = by_hand / "trainer.json", read_manifest(by_hand)
    file.write_text(json.dumps({**trainer(by_hand), "data_skips": [[8, 10]]}))
    manifest.files["trainer.json"] = hash_file(file)
    (by_hand / "manifest.json").write_text(manifest.to_json())
    train(make("by_hand", *WATCHFUL, BAD, f"train.resume={by_hand}"))
    assert same(at(make.folder / "by_hand", STEPS), at(bad, STEPS))
    again = [{**line, "course": 1} for line in steps(make.folder / "by_hand")]
    assert again == steps(bad, 1)


def signal_at(monkeypatch: pytest.MonkeyPatch, at_update: int) -> None:
    """Ask for a stop after the step with so many updates from now."""
    calls, update = [], Engine.update

    def counted(engine: Engine, *given: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == at_update - 1:  # heard before the next update
            os.kill(os.getpid(), signal.SIGTERM)
        return update(engine, *given, **more)

    monkeypatch.setattr(Engine, "update", counted)


def test_a_resumed_run_remembers_the_rollback(bad, make):
    """Stopped right after it, when only the ledger knows, and again later: the same course."""
    config, run_dir = make("resumed", *WATCHFUL, BAD), make.folder / "resumed"
    rewind = RunLog.rewind

    def stopping(log: RunLog, *given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        rewind(log, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "rewind", stopping)
        stopped = train(config)
    assert (stopped["finished"], stopped["step"]) == (False, 6)
    assert trainer(at(run_dir, 6))["data_skips"] == [[8, 10]]
    shutil.rmtree(at(run_dir, 6))  # as if it had been killed instead
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, 4)
        stopped = train(config)
    assert (stopped["finished"], stopped["step"], stopped["rollbacks"]) == (False, 9, 1)
    assert train(config)["finished"]
    assert steps(run_dir) == steps(bad)
    assert len(rollbacks(run_dir)) == 1
    assert same(at(run_dir, STEPS), at(bad, STEPS))
    ours, theirs = (trainer(at(folder, STEPS)) for folder in (run_dir, bad))
    assert ours.pop("run_id") != theirs.pop("run_id")
    assert ours == theirs


def test_before_the_first_checkpoint_the_run_starts_over(make, monkeypatch):
    """With its buffers (the biases of a router) and random draws (its noise) as at first."""
    moe = ("channel=moe", "channel.bias_update_speed=0.01", "train.total_tokens=1536")
    moe += ("train.save_every=6", "channel.noise=0.1")
    train(make("early", *WATCHFUL, *moe, "guard.inject=[nan_loss@3-4]"))
    (event,) = rollbacks(make.folder / "early")
    assert (event["to_step"], event["checkpoint"], event["data_steps"]) == (0, None, [2, 4])
    monkeypatch.setattr(TokenLoader, "batch", lacking([2, 3]))
    train(make("early_lacking", *moe, "train.keep=9"))
    assert same(at(make.folder / "early", 6), at(make.folder / "early_lacking", 6))
    biases = [
        t for name, t in tensors(at(make.folder / "early", 6)).items() if "expert_bias" in name
    ]
    assert any(bias.any() for bias in biases)


def test_the_checkpoint_to_go_back_to_is_not_deleted(make):
    spread = ("guard.rollback_window=4", "train.save_every=1", "train.keep=1")
    train(make("thrifty", *WATCHFUL, *spread, "guard.inject=[nan_loss@6,nan_loss@8]"))
    (event,) = rollbacks(make.folder / "thrifty")
    assert (event["from_step"], event["to_step"]) == (8, 5)
    assert [step for step, _ in checkpoint.list_checkpoints(make.folder / "thrifty")] == [STEPS]


def test_a_run_from_another_runs_checkpoint_goes_back_to_it(bad, make):
    start = at(bad, 5)
    spoiled = "guard.inject=[nan_loss@7-8]"
    train(make("branch", *WATCHFUL, spoiled, f"train.resume={start}"))
    (event,) = rollbacks(make.folder / "branch")
    assert (event["to_step"], event["checkpoint"]) == (5, str(start))
    assert [line["step"] for line in steps(make.folder / "branch", 1)] == list(range(6, STEPS + 1))


def test_a_rollback_too_many_ends_the_run(make, capsys):
    """With exit code 1: nothing was typed wrong."""
    bad = "guard.inject=[nan_loss@7-20]"
    config = make("hopeless", *WATCHFUL, "guard.max_rollbacks=2", "train.total_tokens=5120", bad)
    says = (
        r"2 of the steps 7 .. 8 skipped, the first: loss not finite, the last: loss not finite, "
        r"after 2 rollbacks: from step 8 to 5, past the samples 48 \.\. 63 \(2 of .*\); from step "
        r"8 to 5, past the samples 64 \.\. 79 .*guard.max_rollbacks=2\. ledger.jsonl"
    )
    with pytest.raises(RunFailed, match=says):
        train(config)
    folder = make.folder / "hopeless"
    assert [event["data_steps"] for event in rollbacks(folder)] == [[6, 8], [8, 10]]
    assert cli.main(["train", *config["overrides"]]) == exits.FAILURE
    assert "error: training: 2 of the steps 7 .. 8 skipped" in capsys.readouterr().err


def test_checkpoints_that_are_all_damaged_stop_the_rollback(make, monkeypatch):
    signal_at(monkeypatch, 6)
    config = make("damaged", *WATCHFUL, "guard.inject=[nan_loss@8-9]")
    assert train(config)["step"] == 6
    monkeypatch.undo()
    folder = make.folder / "damaged"
    update = Engine.update

    def damaging(engine: Engine, *given: object, **more: object) -> object:
        for _, path in checkpoint.list_checkpoints(folder):
            (path / "trainer.json").write_text("{}")
        return update(engine, *given, **more)

    monkeypatch.setattr(Engine, "update", damaging)
    with pytest.raises(
        RunFailed, match=r"rollback: steps from 8 on went wrong, but every checkpoint in .* damaged"
    ):
        train(config)


def test_signals_end_with_their_exit_code_and_the_same_command_continues(make, monkeypatch):
    config = make("signalled")
    signal_at(monkeypatch, 3)
    assert cli.main(["train", *config["overrides"]]) == exits.STOPPED == 85
    assert [step for step, _ in checkpoint.list_checkpoints(make.folder / "signalled")] == [3]
    assert cli.main(["train", *config["overrides"]]) == exits.FINISHED == 0


@pytest.mark.slow
def test_two_ranks_at_other_stages(workers, bad, make, corpus, small):
    """The same decisions as one rank's, and no trace either."""
    out = make.folder / "two"
    out.mkdir()
    workers("guard_worker.py", 2, out, *corpus, *small, *STEADY, *WATCHFUL, BAD)
    kinds = ("step", "course", "applied", "samples", "tokens")
    for stage in ("zero0", "zero2", "zero3"):
        guarded, plain = out / f"guarded-{stage}", out / f"lacking-{stage}"
        assert same(at(guarded, STEPS), at(plain, STEPS - 2)), stage
        for ours, one in zip(steps(guarded), steps(bad), strict=True):
            assert {k: ours[k] for k in kinds} == {k: one[k] for k in kinds}
            assert str(ours["reason"])[:10] == str(one["reason"])[:10]
            if ours["loss"] is not None:  # NaN
                assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert trainer(at(guarded, STEPS))["data_skips"] == [[8, 10]]
