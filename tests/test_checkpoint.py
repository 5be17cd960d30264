"""The checkpoint format: all of it or nothing, any cut of it readable, damage named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtrain import checkpoint, fragments, manifest
from llmtrain.checkpoint import BadCheckpoint, FragmentReader, load_model
from llmtrain.distributed import World
from llmtrain.fragments import Wanted
from llmtrain.manifest import rank_file
from llmtrain.train import checkpoint as writing
from llmtrain.train import image
from llmtrain.train.checkpoint import CheckpointWriter, SaveFailed
from llmtrain.train.image import Image, Streamed
from llmtrain.train.partitions import Fragment

KINDS = ("param", "exp_avg", "exp_avg_sq")
SHAPES = {"model.a": (3, 5), "model.b": (7,)}
ALONE = World(rank=0, size=1, local_rank=0)


def values(name: str, kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=draw)


def cut_up(*cuts: int) -> list[Fragment]:
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
        return writer.save(step, cut_up(*cuts), state, {"step": step})

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
    path = write(1)
    reader = FragmentReader(path)
    fragments.check_parameters(path, reader.manifest, SHAPES)
    with pytest.raises(
        ValueError,
        match=r"model.c is not in it; model.b is not in the model; model.a is \[3, 5\] in it, "
        r"\[5, 3\] in the model; use the configuration",
    ):
        fragments.check_parameters(path, reader.manifest, {"model.a": (5, 3), "model.c": (1,)})
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
    newer = r"got format 99 \(written by llmtrain \?\), expected format 1 or 2, which llmtrain \d"
    with pytest.raises(BadCheckpoint, match=newer):
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
        SaveFailed,
        match=r"checkpoint of step 3: could not be written to .*Not a directory.*\(there is none y",
    ):
        write(3)


@pytest.fixture
def write_together(tmp_path):
    """write_together(step, [fragments of rank 0, of rank 1, ...]): what several ranks write."""

    def make(step: int, shares: list[list[Fragment]]) -> Path:
        writer = CheckpointWriter(
            tmp_path / "run",
            ALONE,
            config={"seed": 1},
            keep=9,
            vocab_size=11,
            parameters=SHAPES,
            corpus_files={},
        )
        temporary = writer.folder / f".tmp-{manifest.step_name(step)}"
        temporary.mkdir(parents=True)
        results = []
        for rank, share in enumerate(shares):
            content = Image.of(share, {"rng_cpu": torch.full((8,), rank, dtype=torch.uint8)}, rank)
            chunk_at, file = Streamed(content).chunk, temporary / rank_file(rank)
            entry = writing.write_file(file, content.size, chunk_at, writer.pool, ahead=4)
            results.append((entry, content.kinds, None))
        writer.world = World(rank=0, size=len(shares), local_rank=0)
        writer.commit(temporary, step, results, {"step": step})
        return writer.path(step)

    return make


def thirds() -> list[list[Fragment]]:
    """What three ranks write; the files of the first two have the same size."""
    first, second, third, *rest = cut_up(4, 8)
    return [[first], [second], [third, *rest]]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 bytes rather than 64 MiB, so that small files have many."""
    for module in (manifest, writing, image):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(fragments, "BATCH_BYTES", 24)


def test_many_chunks_and_batches(small_chunks, write):
    path = write(1, 4)
    entry = checkpoint.verify(path).files["rank-00000.safetensors"]
    content = (path / "rank-00000.safetensors").read_bytes()
    pieces = [content[at : at + 64] for at in range(0, len(content), 64)]
    assert entry["sha256"] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    assert len(pieces) > 2 * image.AHEAD
    stored = load_file(path / "rank-00000.safetensors")
    assert torch.equal(stored["exp_avg|model.a|4"], values("model.a", "exp_avg")[4:])
    outs = {(kind, name): torch.empty(SHAPES[name]).view(-1) for name in SHAPES for kind in KINDS}
    FragmentReader(path).read_all(
        Wanted(kind=kind, name=name, offset=0, out=out) for (kind, name), out in outs.items()
    )
    for (kind, name), out in outs.items():
        assert torch.equal(out, values(name, kind))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_verifies_what_it_fills(small_chunks, write_together, size, dtype):
    """Whatever bit is flipped in a rank's file, one rank of those who load says so, and where."""
    path = write_together(1, thirds())
    outs = {
        (kind, name): torch.full(SHAPES[name], float("nan"), dtype=dtype).view(-1)
        for name in SHAPES
        for kind in KINDS
    }

    def load(rank: int) -> list[str]:
        wanted = [Wanted(kind=k, name=n, offset=0, out=out) for (k, n), out in outs.items()]
        return checkpoint.load(path, wanted, rank=rank, size=size)

    for rank in range(size):
        assert load(rank) == []
        for (kind, name), out in outs.items():
            assert torch.equal(out, values(name, kind).to(dtype))
            out.fill_(float("nan"))
    for name in checkpoint.read_manifest(path).rank_files:
        for at in range(0, (path / name).stat().st_size, 5):
            change(path / name, at)
            found = [load(rank) for rank in range(size)]
            change(path / name, at)
            said = f"{name} is damaged: got sha256"
            where = f"in its bytes {at - at % 64} to"
            assert any(said in text and where in text for part in found for text in part), found


def test_load_reads_every_byte_once(small_chunks, write, monkeypatch):
    path = write(1, 4)
    read, preadv = [], os.preadv

    def count(descriptor: int, buffers: list, offset: int) -> int:
        read.append(got := preadv(descriptor, buffers, offset))
        return got

    monkeypatch.setattr(os, "preadv", count)
    outs = {(kind, name): torch.empty(SHAPES[name]).view(-1) for name in SHAPES for kind in KINDS}
    wanted = [Wanted(kind=k, name=n, offset=0, out=out) for (k, n), out in outs.items()]
    assert checkpoint.load(path, wanted) == []
    whole = checkpoint.read_manifest(path)
    assert sum(read) == sum(whole.files[name]["size"] for name in whole.rank_files)
    for (kind, name), out in outs.items():
        assert torch.equal(out, values(name, kind))


def test_load_of_a_checkpoint_that_lacks_tensors(write):
    path = write(1)
    wanted = [Wanted(kind="param", name="model.a", offset=0, out=torch.empty(16))]
    (text,) = checkpoint.load(path, wanted)
    assert text.startswith("param of model.a: got 15 of the elements 0 .. 16")


def test_every_dtype(write_together):
    """Wide elements come first in the file; who wants another dtype gets it converted."""
    kinds = {
        "param": torch.arange(15, dtype=torch.uint8),
        "small": torch.arange(15, dtype=torch.bfloat16),
        "count": torch.arange(15, dtype=torch.int64),
        "exact": torch.arange(15, dtype=torch.float64) / 3,
    }
    whole = [Fragment(name="model.a", offset=0, views=kinds), cut_up()[1]]
    path = write_together(1, [whole])
    reader, stored = FragmentReader(path), load_file(path / rank_file(0))
    for kind, tensor in kinds.items():
        assert torch.equal(stored[f"{kind}|model.a|0"], tensor)
        assert reader.dtype_of(kind, "model.a") == tensor.dtype
        same, other = torch.empty(4, dtype=tensor.dtype), torch.empty(4)
        reader.read(kind, "model.a", 3, same)
        reader.read(kind, "model.a", 3, other)
        assert torch.equal(same, tensor[3:7])
        assert torch.equal(other, tensor[3:7].float())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_verify_a_share_each(small_chunks, write_together, size):
    """A flipped bit anywhere is found by one rank; shares are contiguous and about as large."""
    path = write_together(1, thirds())
    found_by = []
    for name in sorted(checkpoint.read_manifest(path).files):
        for at in range(0, (path / name).stat().st_size, 50):
            change(path / name, at)
            found = [checkpoint.problems(path, rank=rank, size=size) for rank in range(size)]
            change(path / name, at)
            # a header that is damaged may not be readable either: rank 0 says so besides
            finders = [r for r in range(size) if any("got sha256" in text for text in found[r])]
            assert len(finders) == 1, (name, at, found)
            assert f"{name} is damaged" in found[finders[0]][0]
            assert f"in its bytes {at - at % 64} to" in found[finders[0]][0]
            found_by += finders
    assert found_by == sorted(found_by)
    shares = [found_by.count(rank) / len(found_by) * size for rank in range(size)]
    assert min(shares) > 0.5
    assert max(shares) < 1.5


@pytest.mark.parametrize(
    "name", [rank_file(0), rank_file(2), "manifest.json", "trainer.json", "config.yaml"]
)
@pytest.mark.parametrize("damage", ["truncated", "longer", "deleted", 0, 0.3, 0.5, 1])
def test_every_damage_of_every_file_is_named(write_together, tmp_path, caplog, name, damage):
    good, bad = write_together(3, thirds()), write_together(7, thirds())
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"}")
    elif damage == "deleted":
        file.unlink()
    else:
        content[int(damage * (len(content) - 1))] ^= 4
        file.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=rf"step-00000007: .*{name}"):
        checkpoint.verify(bad)
    assert checkpoint.newest_good(tmp_path / "run") == good
    assert name in caplog.text


def test_files_of_two_ranks_exchanged(write_together):
    """All tensors are still covered, and sizes agree: only the hashes tell."""
    path = write_together(1, thirds())
    one, two = (path / rank_file(rank) for rank in (0, 1))
    assert one.stat().st_size == two.stat().st_size
    one.rename(path / "aside")
    two.rename(one)
    (path / "aside").rename(two)
    assert not checkpoint.problems(path, content=False)
    with pytest.raises(BadCheckpoint, match=r"rank-00000.*damaged.*; rank-00001.*damaged"):
        checkpoint.verify(path)


def test_foreign_files_and_folders(write_together, tmp_path):
    path, later = write_together(1, thirds()), write_together(2, thirds())
    (path / "notes.txt").write_text("a user's")
    (path / "eval").mkdir()
    checkpoint.verify(path)
    shutil.copy(later / rank_file(0), path / rank_file(3))
    with pytest.raises(
        BadCheckpoint, match=r"rank-00003.safetensors does not belong to this checkpoint of 3 ranks"
    ):
        checkpoint.verify(path)
    (path / rank_file(3)).unlink()
    shutil.copy(later / "trainer.json", path / "trainer.json")
    with pytest.raises(BadCheckpoint, match=r"trainer.json is damaged: got sha256"):
        checkpoint.verify(path)
    renamed = later.rename(later.with_name("step-00000005"))
    with pytest.raises(
        BadCheckpoint, match=r"got the checkpoint of step 2 in this folder, expected that of step 5"
    ):
        checkpoint.verify(renamed)


def edit(path: Path, seal: bool, **changes: object) -> None:
    """Change a manifest, and with seal its sha256 too, as a faulty writer would."""
    file = path / "manifest.json"
    content = json.loads(file.read_text()) | changes
    content.pop("sha256")
    file.write_text(json.dumps(content | {"sha256": manifest.digest_of(content) if seal else "0"}))


def test_edited_manifest(write_together):
    path = write_together(1, thirds())
    edit(path, seal=True)
    checkpoint.verify(path)
    edit(path, seal=False)
    with pytest.raises(BadCheckpoint, match=r"manifest.json is damaged: its content is not what i"):
        checkpoint.verify(path)
    edit(path, seal=True, surplus=1)
    with pytest.raises(BadCheckpoint, match=r"manifest.json is damaged: got the keys .*surplus"):
        checkpoint.verify(path)


def fragment(name: str, kind: str, offset: int, elements: int) -> Fragment:
    return Fragment(name=name, offset=offset, views={kind: torch.zeros(elements)})


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        ([], 0, r"param of model.a: elements 0 to 4 are stored nowhere"),
        ([], 2, r"param of model.a: got 8 elements, expected 15"),
        ([("model.a", "param", 3, 2)], None, r"param of model.a: elements 3 to 4 are stored twice"),
        ([("model.a", "param", 14, 4)], None, r"param of model.a: got 18 elements, expected 15"),
        ([("model.c", "param", 0, 4)], None, r"model.c is stored, but not in manifest.json"),
        ([("model.b", "momentum", 0, 6)], None, r"momentum of model.b: got 6 elements, expected 7"),
    ],
)
def test_fragments_that_do_not_cover_are_never_committed(write_together, added, removed, message):
    whole = cut_up(4, 8)
    share = [f for i, f in enumerate(whole) if i != removed]
    extra = [fragment(*facts) for facts in added]
    with pytest.raises(BadCheckpoint, match=message):
        write_together(1, [share, extra] if extra else [share])


def test_coverage_needs_no_data_and_is_part_of_verify(write_together):
    path = write_together(1, thirds())
    kinds = json.loads((path / "manifest.json").read_text())["kinds"]
    assert kinds == {name: list(KINDS) for name in SHAPES}
    edit(path, seal=True, kinds=kinds | {"model.a": [*KINDS, "momentum"]})
    lacks = ["momentum of model.a: got 0 elements, expected 15"]
    assert checkpoint.problems(path, content=False) == lacks
    with pytest.raises(BadCheckpoint, match=r"momentum of model.a: got 0 elements"):
        checkpoint.verify(path)
    edit(path, seal=True, kinds=kinds | {"model.a": ["param", "exp_avg"]})
    assert checkpoint.problems(path) == [
        "exp_avg_sq of model.a is stored, but not in manifest.json"
    ]


def test_format_1_is_read(write, tmp_path):
    """One sha256 a file, and nothing said about kinds."""
    path = write(4, 4)
    content = json.loads((path / "manifest.json").read_text())
    for name in ("sha256", "kinds", "chunk_bytes"):
        del content[name]
    content["format"] = 1
    for name, entry in content["files"].items():
        entry["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content))
    assert checkpoint.verify(path).format == 1
    out = torch.empty(15)
    FragmentReader(path).read("param", "model.a", 0, out)
    assert torch.equal(out, values("model.a", "param"))
    change(path / rank_file(0), -1)
    with pytest.raises(BadCheckpoint, match=r"rank-00000.safetensors is damaged: got sha256"):
        checkpoint.verify(path)
