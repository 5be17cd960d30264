"""The checkpoint format: all of it or nothing, any cut of it readable, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain import checkpoint
from llmtrain.checkpoint import BadCheckpoint, FragmentReader, load_model
from llmtrain.distributed import World
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.partitions import KINDS, Fragment

SHAPES = {"model.a": (3, 5), "model.b": (7,)}
ALONE = World(rank=0, size=1, local_rank=0)


def values(name: str, kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=draw)


def fragments(*cuts: int) -> list[Fragment]:
    """Both parameters, cut at these places."""
    found = []
    for name in SHAPES:
        whole = {kind: values(name, kind) for kind in KINDS}
        ends = [cut for cut in cuts if cut < len(whole["param"])] + [len(whole["param"])]
        for start, end in zip([0, *ends], ends):
            views = {kind: tensor[start:end] for kind, tensor in whole.items()}
            found.append(Fragment(name=name, offset=start, views=views))
    return found


@pytest.fixture
def write(tmp_path):
    """write(step) -> the folder of a checkpoint in tmp_path/run."""
    table = tmp_path / "token_bytes.npy"
    table.write_bytes(b"not looked into")

    def make(step: int, *cuts: int, keep: int = 3) -> Path:
        writer = CheckpointWriter(
            tmp_path / "run",
            ALONE,
            config={"seed": 1},
            keep=keep,
            vocab_size=11,
            parameters=SHAPES,
            corpus_files={"token_bytes.npy": table},
        )
        state = {"rng_cpu": torch.arange(8, dtype=torch.uint8)}
        return writer.save(step, fragments(*cuts), state, {"step": step})

    return make


def change(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_content(write):
    path = write(12, 4)
    assert path.name == "step-00000012"
    manifest = checkpoint.verify(path)
    assert (manifest.step, manifest.world_size, manifest.vocab_size) == (12, 1, 11)
    assert {n: tuple(s) for n, s in manifest.parameters.items()} == SHAPES
    assert set(manifest.files) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert json.loads((path / "trainer.json").read_text()) == {"step": 12}
    stored = load_file(path / "rank-00000.safetensors")  # the library reads what we wrote
    torch.testing.assert_close(
        stored["param|model.a|4"], values("model.a", "param")[4:], rtol=0, atol=0
    )
    assert (path.parent / "latest").read_text().strip() == path.name


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 6, 9)])
def test_any_slice_is_read_from_any_cut(write, cuts):
    reader = FragmentReader(write(1, *cuts))
    for name in SHAPES:
        for kind in KINDS:
            expected = values(name, kind)
            for start in range(len(expected)):
                for end in range(start + 1, len(expected) + 1):
                    out = torch.full((end - start,), float("nan"))
                    reader.read(kind, name, start, out)
                    assert torch.equal(out, expected[start:end])
    assert torch.equal(reader.ranks_key("rng_cpu", 0), torch.arange(8, dtype=torch.uint8))
    assert reader.ranks_key("rng_cpu", 1) is None


def test_other_parameters_are_named(write):
    reader = FragmentReader(write(1))
    reader.check_parameters(SHAPES)
    with pytest.raises(
        ValueError,
        match=r"model.c is not in it; model.b is not in the model; model.a is \[3, 5\] in it, "
        r"\[5, 3\] in the model; use the configuration",
    ):
        reader.check_parameters({"model.a": (5, 3), "model.c": (1,)})
    with pytest.raises(BadCheckpoint, match=r"param of model.a: got 15 of the elements 0 .. 16"):
        reader.read("param", "model.a", 0, torch.empty(16))


def test_damage_is_named(write):
    path = write(3)
    file = path / "rank-00000.safetensors"
    change(file, -1)
    with pytest.raises(
        BadCheckpoint, match=r"step-00000003: rank-00000.* damaged: got sha256 .*exp"
    ):
        checkpoint.verify(path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        BadCheckpoint, match=r"rank-00000.safetensors is damaged: got \d+ bytes, exp"
    ):
        checkpoint.verify(path)
    file.unlink()
    with pytest.raises(BadCheckpoint, match=r"file rank-00000.safetensors is missing; use another"):
        checkpoint.verify(path)
    with pytest.raises(BadCheckpoint, match=r"cannot read rank-00000.safetensors"):
        FragmentReader(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"step-00000003: manifest.json is damaged"):
        checkpoint.verify(path)
    (path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(
        BadCheckpoint, match=r"got format 99 .*, expected format 1 or 2, which llmtr"
    ):
        checkpoint.verify(path)


def test_newest_good_skips_damaged_ones(write, tmp_path, caplog):
    run_dir = tmp_path / "run"
    assert checkpoint.newest_good(run_dir) is None
    good, bad = write(5), write(9)
    assert checkpoint.newest_good(run_dir) == checkpoint.resolve(run_dir) == bad
    change(bad / "trainer.json", 2)
    assert checkpoint.newest_good(run_dir) == checkpoint.resolve(run_dir) == good
    assert "step-00000009: trainer.json is damaged" in caplog.text
    with pytest.raises(BadCheckpoint, match=r"trainer.json is damaged"):
        checkpoint.resolve(bad)
    change(good / "trainer.json", 2)
    with pytest.raises(BadCheckpoint, match="got only damaged checkpoints in this run folder"):
        checkpoint.resolve(run_dir)


def test_no_checkpoint_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            BadCheckpoint, match=r"got no manifest.json, expected a checkpoint fold"
        ):
            load_model(path)


def test_retention_keeps_the_newest(write, tmp_path):
    for step in (1, 2, 3, 4):
        write(step, keep=2)
    run_dir = tmp_path / "run"
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [3, 4]
    # a later one (of a course that was left) neither counts nor goes
    write(9, keep=9)
    write(5, keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [5, 9]


def test_leftovers_of_an_interrupted_save_go(write, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".tmp-step-00000002").mkdir(parents=True)
    (folder / ".tmp-step-00000002" / "rank-00000.safetensors").write_bytes(b"half")
    (folder / ".tmp-latest").write_text("step")
    assert checkpoint.list_checkpoints(tmp_path / "run") == []
    write(3)
    assert {p.name for p in folder.iterdir()} == {"step-00000003", "latest"}


def test_folder_that_cannot_be_written(write, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(
        ValueError,
        match=r"checkpoint of step 3: could not be written to .*Not a directory.*\(there is none yet\)",
    ):
        write(3)
