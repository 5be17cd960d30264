"""What is deleted after a save, and above all what is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint
from llmtrain.distributed import World
from llmtrain.manifest import rank_file
from llmtrain.train import retention
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.partitions import Fragment


@pytest.fixture
def start(tmp_path):
    """start(keep=2, ...): a start of a run in tmp_path; its save(step) writes a checkpoint."""

    def make(**knobs):
        writer = CheckpointWriter(
            tmp_path,
            World(rank=0, size=1, local_rank=0),
            config={},
            vocab_size=1,
            parameters={"model.a": (8,)},
            corpus_files={},
            **{"keep": 1, **knobs},
        )
        views = {"param": torch.arange(8.0)}

        def save(*steps: int) -> list[int]:
            for step in steps:
                writer.save(step, [Fragment(name="model.a", offset=0, views=views)], {}, {})
            return [step for step, _ in checkpoint.list_checkpoints(tmp_path)]

        return save

    return make


def damage(run_dir: Path, step: int) -> None:
    file = run_dir / "checkpoints" / f"step-{step:08d}" / rank_file(0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_newest_stay(start, tmp_path):
    assert start(keep=2)(1, 2, 3, 4) == [3, 4]
    # a later one (of a course that was left) neither counts nor goes
    assert start(keep=9)(9) == [3, 4, 9]
    assert start(keep=1)(5) == [5, 9]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_course_that_was_left_goes_when_the_new_one_has_passed_it(start, tmp_path):
    """... with as many good checkpoints as are kept."""
    folder = tmp_path / "checkpoints"
    save = start(keep=2, keep_every=3)
    save(1, 2, 3, 4)
    for step in (3, 4):
        set_aside = f"step-{step:08d}.superseded-1"
        (folder / f"step-{step:08d}").rename(folder / set_aside)

    def left() -> list[str]:
        return sorted(path.name for path in folder.glob("*superseded*"))

    both = ["step-00000003.superseded-1", "step-00000004.superseded-1"]
    assert save(3) == [3]
    assert left() == both
    assert save(4) == [3, 4]
    assert left() == both[1:]
    damage(tmp_path, 4)
    assert save(5) == [3, 4, 5]
    assert left() == both[1:]  # the newest two good ones are those of steps 3 and 5
    assert save(6) == [3, 5, 6]
    assert left() == []
    assert not list(folder.glob(".tmp-*"))


def test_every_so_many_steps_one_stays_for_good(start):
    assert start(keep=2, keep_every=4)(*range(1, 12)) == [4, 8, 10, 11]
    # those that stay anyway count among the newest
    assert start(keep=2, keep_every=4)(12) == [4, 8, 11, 12]


def test_damaged_ones_do_not_count(start, tmp_path, caplog):
    save = start(keep=2)
    save(1, 2)
    damage(tmp_path, 2)
    assert save(3) == [1, 2, 3]  # 2 would be the second; without it 1 is the last good one but 3
    assert "step-00000002 is damaged and does not count as kept: rank-00000" in caplog.text
    assert save(4) == [3, 4]


def test_those_of_earlier_starts_are_read_before_they_count(start, tmp_path):
    start(keep=3)(1, 2, 3)
    damage(tmp_path, 3)
    damage(tmp_path, 2)
    assert start(keep=2)(4) == [1, 2, 3, 4]
    assert start(keep=1)(5) == [5]


def test_what_was_written_or_read_once_is_not_read_again(start, tmp_path, monkeypatch):
    start(keep=3)(1, 2)
    read, problems = [], retention.problems

    def note(path):
        read.append(path.name)
        return problems(path)

    monkeypatch.setattr(retention, "problems", note)
    save = start(keep=3)
    assert save(3, 4, 5) == [3, 4, 5]
    assert read == ["step-00000002"]  # with 1 to 3 there is nothing to decide
    copied = tmp_path / "checkpoints" / "step-00000005" / "trainer.json"
    copied.write_text(copied.read_text())  # the same content, but who knows
    assert save(6) == [4, 5, 6]
    assert read[1:] == ["step-00000005"]


def test_lost_files_do_not_count(start, tmp_path):
    save = start(keep=2)
    save(1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    assert save(3) == [1, 3]
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    assert save(4) == [1, 3, 4]


def test_failing_to_delete_is_told_and_tried_again(start, tmp_path, monkeypatch, caplog):
    save = start(keep=1)
    save(1)

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", fail)
    assert save(2) == [2]  # no longer taken for a checkpoint
    assert "an old checkpoint could not be deleted: [Errno 13]" in caplog.text
    monkeypatch.undo()
    assert len(list((tmp_path / "checkpoints").glob(".tmp-old-*"))) == 1
    assert start(keep=1)(3) == [3]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
