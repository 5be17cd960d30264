"""Which checkpoint a start continues, and whether it belongs to the run of this folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain import checkpoint
from llmtrain.checkpoint import BadCheckpoint
from llmtrain.distributed import World
from llmtrain.train import resume
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.partitions import Fragment

ALONE = World(rank=0, size=1, local_rank=0)


def start(run_dir: Path, *steps: int, train_resume: str = "auto") -> Path | None:
    """What a start of a run does, as far as it matters here; writes checkpoints of these steps.
    Returns what it continued from."""
    candidates = resume.Candidates.of(train_resume, run_dir, ALONE)
    chosen = candidates.first() and candidates.load(checkpoint.verify)
    if chosen is not None:
        resume.settle_on(chosen, run_dir, ALONE)
    run_dir.mkdir(exist_ok=True)
    trainer = {} if chosen is None else resume.read_trainer(chosen)
    run_id = resume.claim_run_id(run_dir, chosen, trainer, ALONE)
    config = {"train": {"resume": train_resume}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    writer = CheckpointWriter(
        run_dir, ALONE, config=config, keep=9, vocab_size=1, parameters={"a": (4,)}, corpus_files={}
    )
    fragment = Fragment(name="a", offset=0, views={"param": torch.arange(4.0)})
    for step in steps:
        writer.save(step, [fragment], {}, {"step": step, "run_id": run_id})
    return chosen


def run_id(run_dir: Path) -> str:
    return (run_dir / "run_id").read_text().strip()


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint.list_checkpoints(run_dir)]


def test_a_run_keeps_its_id_and_a_new_one_gets_its_own(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(first, 1, 2) is None
    known = run_id(first)
    assert start(first, 3).name == "step-00000002"
    assert run_id(first) == known
    start(second, 1)
    assert run_id(second) != known
    start(first, 1, train_resume="never")
    assert run_id(first) != known
    assert run_id(first / "previous-1") == known


def test_a_lost_run_id_is_taken_from_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    start(run, 1)
    known = run_id(run)
    (run / "run_id").unlink()
    start(run, 2)
    assert run_id(run) == known
    (run / "run_id").write_text("something else")
    with pytest.raises(ValueError, match=r"run_id: got 'something else', expected 32 hexadecimal"):
        start(run)


def test_mixed_up_run_folders_are_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    start(first, 1, 7)
    start(second, 1, 3)
    foreign = second / "checkpoints" / "step-00000007"
    shutil.copytree(first / "checkpoints" / "step-00000007", foreign)
    message = rf"made by run {run_id(first)[:12]}, but .*second is the folder of run .*mixed"
    with pytest.raises(ValueError, match=message):
        start(second)
    assert steps(second) == [1, 3, 7]  # nothing was set aside
    with pytest.raises(ValueError, match=message):
        start(second, train_resume=str(foreign))
    shutil.rmtree(foreign)
    assert start(second).name == "step-00000003"


def test_another_runs_checkpoint_on_purpose(tmp_path):
    """It starts a run of its own; the same command then continues that one."""
    first, second = tmp_path / "first", tmp_path / "second"
    start(first, 1, 2, 3)
    path = first / "checkpoints" / "step-00000002"
    assert start(second, 5, 6, train_resume=str(path)) == path
    assert run_id(second) != run_id(first)
    trainer = json.loads((second / "checkpoints/step-00000005/trainer.json").read_text())
    assert trainer["run_id"] == run_id(second)
    assert start(second, train_resume=str(path)).name == "step-00000006"
    assert steps(second) == [5, 6]
    with pytest.raises(ValueError, match=r"did not start from it, expected a new run_dir"):
        start(second, train_resume=str(first))
    assert start(tmp_path / "third", train_resume=str(first)).name == "step-00000003"


def test_back_to_an_own_checkpoint_sets_the_later_ones_aside(tmp_path):
    run = tmp_path / "run"
    start(run, 1, 2, 3)
    path = run / "checkpoints" / "step-00000001"
    assert start(run, train_resume=str(path)) == path
    assert steps(run) == [1]
    assert (run / "checkpoints" / "step-00000003.superseded-1").is_dir()
    assert start(run, 2, 3).name == "step-00000001"


def test_damaged_ones(tmp_path, caplog):
    run = tmp_path / "run"
    start(run, 1, 2)
    bad = run / "checkpoints" / "step-00000002"
    (bad / "trainer.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"step-00000002: file trainer.json is missing"):
        start(run, train_resume=str(bad))
    assert start(tmp_path / "other", train_resume=str(run)).name == "step-00000001"
    assert start(run).name == "step-00000001"
    said = [text for text in caplog.messages if text.startswith("not used: checkpoint")]
    assert len(said) == 2  # once by each start
    (run / "checkpoints" / "step-00000001" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged .*train.resume=never"):
        start(run)
    with pytest.raises(ValueError, match=r"got no manifest.json, expected a checkpoint folder"):
        start(tmp_path / "new", train_resume=str(tmp_path))


def test_changed_configuration_names_what_may_change(tmp_path):
    start(tmp_path / "run", 1)
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    resume.check_config(path, {"train": {"resume": "never"}})
    with pytest.raises(
        ValueError,
        match=r"seed: None then, 1 now\. Set .* What may change: name, .*train.async_save, .*, "
        r"data\.\*, without data.weights",
    ):
        resume.check_config(path, {"train": {"resume": "never"}, "seed": 1})
