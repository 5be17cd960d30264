import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from llmtrain_data import partial, shards
from llmtrain_data.documents import Document
from llmtrain_data.inspect import main, report
from llmtrain_data.manifest import Manifest, open_split, verify_corpus
from llmtrain_data.sources import Jsonl, LocalFiles
from llmtrain_data.tokenizer import Existing, load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def hashes(directory):
    """File -> sha256, of everything below directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def documents(corpus, split, source="words"):
    """The texts of a split, decoded from the shards."""
    tokenizer = load_tokenizer(corpus)
    for shard in open_split(corpus, Manifest.load(corpus), split)[source]:
        for begin, end in zip(shard.starts[:-1], shard.starts[1:]):
            tokens_T = shard.tokens[begin:end].tolist()
            assert tokens_T[0] == 0
            assert 0 not in tokens_T[1:]
            yield tokenizer.decode(tokens_T[1:], skip_special_tokens=False)


def test_every_document_is_in_one_split_in_order(tmp_path, make_corpus, texts):
    manifest = make_corpus(shard_tokens=2000)
    train = list(documents(tmp_path / "corpus", "train"))
    val = list(documents(tmp_path / "corpus", "val"))
    assert 10 < len(val) < 60
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]
    source = manifest.splits["train"]["words"]
    assert source.documents == len(train)
    assert source.bytes == sum(len(text.encode()) for text in train)
    assert len(source.shards) > 5
    assert all(shard.tokens >= 2000 for shard in source.shards[:-1])
    lengths_O = np.load(tmp_path / "corpus" / "token_bytes.npy")
    streams = open_split(tmp_path / "corpus", manifest, "train")["words"]
    assert sum(int(lengths_O[shard.tokens].sum()) for shard in streams) == source.bytes


def test_manifest_on_disk(tmp_path, make_corpus):
    manifest = make_corpus()
    fields = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    entry = fields["splits"]["train"]["words"]["shards"][0]
    path = tmp_path / "corpus" / "train" / "words" / entry["file"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()[128:]).hexdigest()
    assert fields["fingerprint"] == manifest.fingerprint
    assert Manifest.load(tmp_path / "corpus") == manifest == verify_corpus(tmp_path / "corpus")
    tokenizer = (tmp_path / "corpus" / "tokenizer.json").read_bytes()
    assert fields["tokenizer_sha256"] == hashlib.sha256(tokenizer).hexdigest()
    assert (manifest.vocab_size, manifest.eot, manifest.eot_id) == (300, "<|endoftext|>", 0)
    assert sorted(os.listdir(tmp_path)) == ["corpus"]


def test_repeated_documents_stay_on_one_side(tmp_path, make_corpus, listed, texts):
    make_corpus(sources={"words": listed(texts * 2), "more": listed(texts[:50])}, val_fraction=0.3)
    corpus = tmp_path / "corpus"
    train = {*documents(corpus, "train"), *documents(corpus, "train", "more")}
    val = {*documents(corpus, "val"), *documents(corpus, "val", "more")}
    assert not train & val
    assert train | val == set(texts)


def test_val_sources_are_held_out_of_training(tmp_path, make_corpus, listed, texts):
    make_corpus(
        sources={"words": listed(texts)},
        val_sources={"held": listed([*texts[10:20], "new"])},
        val_fraction=0,
    )
    assert list(documents(tmp_path / "corpus", "train")) == texts[:10] + texts[20:]
    assert list(documents(tmp_path / "corpus", "val", "held")) == [*texts[10:20], "new"]


def test_workers_do_not_change_a_byte(tmp_path, make_corpus, listed, texts, monkeypatch):
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 5000)
    monkeypatch.setattr("llmtrain_data.prepare.SEGMENT_CHARS", 4000)
    long = "\n".join(texts)  # many segments
    sources = {"words": listed([*texts[:100], long, *texts[100:]]), "more": listed(texts)}
    wanted = None
    for workers in (1, 2, 3):
        make_corpus(out=f"w{workers}", sources=sources, workers=workers, shard_tokens=10_000)
        found = hashes(tmp_path / f"w{workers}")
        wanted = wanted or found
        assert found == wanted
    assert len([name for name in wanted if name.endswith(".bin")]) > 6
    assert list(documents(tmp_path / "w1", "train")).count(long) == 1


def test_the_same_request_is_done_already(tmp_path, make_corpus, capsys):
    first = make_corpus()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}
    capsys.readouterr()
    assert make_corpus() == first
    assert "already prepared" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").rglob("*")}


def test_another_request_is_refused_unless_overwritten(tmp_path, make_corpus, message, listed):
    first = make_corpus()
    with message("corpus", "another request", "val_fraction: was 0.1, asked for 0.2", "overwrite"):
        make_corpus(val_fraction=0.2)
    with message("sources.more: was 'absent', asked for {'kind': 'listed'}"):
        make_corpus(sources={"words": listed(["x"]), "more": listed(["x"])})
    assert Manifest.load(tmp_path / "corpus") == first
    second = make_corpus(val_fraction=0.2, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert Manifest.load(tmp_path / "corpus") == second
    assert sorted(os.listdir(tmp_path)) == ["corpus"]


def test_changed_files_are_another_request(tmp_path, make_corpus, message, texts):
    (tmp_path / "in").mkdir()
    for index, text in enumerate(texts[:40]):
        (tmp_path / "in" / f"{index}.txt").write_bytes(text.encode())
    sources = {"files": LocalFiles(str(tmp_path / "in"))}
    make_corpus(sources=sources)
    make_corpus(sources=sources)
    (tmp_path / "in" / "0.txt").write_bytes(b"changed")
    with message("sources.files.listing", "overwrite=true", "data.name"):
        make_corpus(sources=sources)


def test_what_is_no_corpus_is_left_alone(tmp_path, make_corpus, message):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with message("corpus", "no manifest.json", "left alone", "another data.name"):
            make_corpus(overwrite=overwrite)
    assert (tmp_path / "corpus" / "thesis.txt").read_text() == "years of work"


def test_neighbours_are_left_alone(tmp_path, make_corpus, message):
    (tmp_path / "corpus.old").mkdir()
    (tmp_path / "corpus.partial").mkdir()
    (tmp_path / "corpus.partial" / "thesis.txt").write_text("years of work")
    with message("corpus.partial", "no preparation wrote it", "left alone", "move it away"):
        make_corpus()
    (tmp_path / "corpus.partial").rename(tmp_path / "corpus.mine")
    make_corpus()
    make_corpus(overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["corpus", "corpus.mine", "corpus.old"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sources": {}}, ["data.sources", "empty", "at least one"]),
        ({"sources": {"a/b": None}}, ["'a/b'", "names a directory", "rename"]),
        ({"val_fraction": 1.0}, ["val_fraction=1.0", "< 1"]),
        ({"val_fraction": -0.1}, ["val_fraction=-0.1", "0 <="]),
        ({"val_sources": {"v": None}}, ["val_fraction=0.1", "['v']", "one of the two"]),
        ({"shard_tokens": 0}, ["shard_tokens=0", "at least 1"]),
        ({"workers": 0}, ["workers=0", "at least 1"]),
    ],
)
def test_bad_settings(tmp_path, make_corpus, message, changes, parts):
    with message("data.", *parts):
        make_corpus(**changes)
    assert list(tmp_path.iterdir()) == []


def test_empty_source(tmp_path, make_corpus, listed, message):
    with message("data.sources.nothing", "no documents", "expected at least one", "filters"):
        make_corpus(sources={"nothing": listed([])})
    with message("data.val_sources.nothing", "no documents"):
        make_corpus(val_sources={"nothing": listed([])}, val_fraction=0)
    assert list(tmp_path.iterdir()) == []


def test_empty_documents_are_dropped(tmp_path, make_corpus, listed, texts):
    manifest = make_corpus(sources={"words": listed(["", *texts, ""])})
    assert sum(manifest.splits[split]["words"].documents for split in ("train", "val")) == 300


def test_a_split_without_documents(tmp_path, make_corpus, listed, texts, message):
    few = {"words": listed(texts[:3])}
    with message("val_fraction=0.0001", "none of 3 documents", "raise data.val_fraction"):
        make_corpus(sources=few, val_fraction=0.0001)
    with message("all 3 documents are validation", "lower data.val_fraction"):
        make_corpus(sources=few, val_fraction=0.9999)
    with message("all 3 documents are validation", "val_sources do not hold"):
        make_corpus(sources=few, val_sources={"same": listed(texts[:3])}, val_fraction=0)
    assert list(tmp_path.iterdir()) == []
    assert list(make_corpus(sources=few, val_fraction=0).splits) == ["train"]


def test_existing_tokenizer_and_its_late_split_check(tmp_path, make_corpus, texts, listed, message):
    make_corpus()
    existing = Existing(path=str(tmp_path / "corpus"))
    make_corpus(out="second", tokenizer=existing)
    first, second = hashes(tmp_path / "corpus"), hashes(tmp_path / "second")
    assert {name: first[name] for name in first if name != "manifest.json"} == {
        name: second[name] for name in second if name != "manifest.json"
    }
    with message("val_fraction=0.0001", "none of 3 documents"):
        make_corpus(
            out="third",
            sources={"words": listed(texts[:3])},
            tokenizer=existing,
            val_fraction=0.0001,
        )


def big_tokenizer(path, size):
    """Byte-level, with ids up to size - 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(a + b + c for a in alphabet for b in alphabet[:40] for c in alphabet[:9])]
    vocab = {name: index for index, name in enumerate(reversed(names[: size - 1]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return Existing(path=str(path))


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype_follows_the_vocabulary(tmp_path, make_corpus, texts, size, dtype):
    manifest = make_corpus(tokenizer=big_tokenizer(tmp_path / "tokenizer", size))
    assert (manifest.vocab_size, manifest.eot_id) == (size, size - 1)
    shard = open_split(tmp_path / "corpus", manifest, "train")["words"][0]
    assert shard.tokens.dtype == dtype
    assert shard.tokens[0] == size - 1
    tokenizer = load_tokenizer(tmp_path / "corpus")
    assert tokenizer.decode(shard.tokens[1 : shard.starts[1]].tolist()) in texts


def test_unwritable_output(tmp_path, make_corpus, message):
    (tmp_path / "file").write_text("")
    with message("file/corpus", "cannot be written", "Not a directory", "permissions"):
        make_corpus(out="file/corpus")


@contextlib.contextmanager
def file_size_limit(limit):
    """Writes past that many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_says_what_is_left_and_the_next_run_ends_the_same(
    tmp_path, make_corpus, listed, texts, message
):
    sources = {"words": listed([*texts, "\n".join(texts) * 10])}
    make_corpus(out="straight", sources=sources, shard_tokens=5000)
    with (
        file_size_limit(60_000),
        message(
            "corpus.partial", "cannot be written", "File too large", "shards finished", "again"
        ),
    ):
        make_corpus(sources=sources, shard_tokens=5000)
    left = tmp_path / "corpus.partial"
    assert not (tmp_path / "corpus").exists()
    assert not list(left.rglob("*.tmp"))
    assert (left / "train" / "words" / "shard-00000.bin").exists()
    make_corpus(sources=sources, shard_tokens=5000)
    assert hashes(tmp_path / "corpus") == hashes(tmp_path / "straight")


def test_disk_full_while_syncing(tmp_path, make_corpus, message, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "close", full)
        with message("cannot be written", "No space left on device", "make room"):
            make_corpus()
    assert not list((tmp_path / "corpus.partial").rglob("*.tmp"))
    make_corpus()


class Interrupted(Exception):
    pass


class Breaking:
    """A source that stops with an exception at a document, while it is told to."""

    def __init__(self, texts, at, passes):
        self.texts, self.at, self.passes = texts, at, passes

    def describe(self):
        return {"kind": "breaking"}

    def __iter__(self):
        self.passes -= 1
        for index, text in enumerate(self.texts):
            if index == self.at and self.passes == 0:
                raise Interrupted
            yield Document(text=text, id=str(index))


def interrupt(make_corpus, texts, at, **changes):
    """Run until document `at` of the pass that writes (the third: probe, sample, write)."""
    with pytest.raises(Interrupted):
        make_corpus(sources={"words": Breaking(texts, at, 3)}, shard_tokens=2000, **changes)


@pytest.mark.parametrize("at", [0, 1, 100, 299])
def test_an_interrupted_run_continues(tmp_path, make_corpus, texts, at, monkeypatch):
    many = texts * 3
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 2000)
    make_corpus(out="straight", sources={"words": Breaking(many, -1, 0)}, shard_tokens=2000)
    interrupt(make_corpus, many, at * 3)
    root = tmp_path / "corpus.partial"
    done = {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")}
    assert not list(root.rglob("*.tmp"))
    assert (len(done) > 5) == (at >= 100)
    tokenizer_time = (root / "tokenizer.json").stat().st_mtime_ns
    make_corpus(sources={"words": Breaking(many, -1, 0)}, shard_tokens=2000)
    assert hashes(tmp_path / "corpus") == hashes(tmp_path / "straight")
    corpus = tmp_path / "corpus"
    assert (corpus / "tokenizer.json").stat().st_mtime_ns == tokenizer_time
    for path, written in done.items():
        assert (corpus / path.relative_to(root)).stat().st_mtime_ns == written


def test_a_source_that_is_through_is_not_encoded_again(
    tmp_path, make_corpus, texts, listed, monkeypatch
):
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 2000)
    with pytest.raises(Interrupted):
        make_corpus(sources={"words": listed(texts), "more": Breaking(texts, 50, 3)})
    found = sorted(path.parent.name for path in (tmp_path / "corpus.partial").rglob("*.bin"))
    assert found == ["words", "words"]


def test_a_torn_progress_line_costs_one_shard(tmp_path, make_corpus, texts, monkeypatch):
    many = texts * 3
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 2000)
    make_corpus(out="straight", sources={"words": Breaking(many, -1, 0)}, shard_tokens=2000)
    interrupt(make_corpus, many, 800)
    progress = tmp_path / "corpus.partial" / "progress.jsonl"
    progress.write_bytes(progress.read_bytes()[:-20])
    make_corpus(sources={"words": Breaking(many, -1, 0)}, shard_tokens=2000)
    assert hashes(tmp_path / "corpus") == hashes(tmp_path / "straight")


def test_other_documents_cannot_continue(tmp_path, make_corpus, texts, message, monkeypatch):
    many = texts * 3
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 2000)
    interrupt(make_corpus, many, 800)
    changed = ["another document", *many[1:]]
    with message("'words'", "not those of the interrupted run", "delete", ".partial"):
        make_corpus(sources={"words": Breaking(changed, -1, 0)}, shard_tokens=2000)
    with message("'words'", "not those of the interrupted run"):
        make_corpus(sources={"words": Breaking(many[:30], -1, 0)}, shard_tokens=2000)
    shutil.rmtree(tmp_path / "corpus.partial")
    make_corpus(sources={"words": Breaking(changed, -1, 0)}, shard_tokens=2000)


def test_another_request_starts_over(tmp_path, make_corpus, texts, monkeypatch):
    many = texts * 3
    monkeypatch.setattr("llmtrain_data.encode.BATCH_CHARS", 2000)
    interrupt(make_corpus, many, 800)
    source = {"words": Breaking(many, -1, 0)}
    make_corpus(sources=source, val_fraction=0.2)
    make_corpus(out="straight", sources=source, val_fraction=0.2)
    assert hashes(tmp_path / "corpus") == hashes(tmp_path / "straight")


def test_two_runs_at_once(tmp_path, make_corpus, message):
    held = partial.Partial(tmp_path / "corpus", {})
    with message("corpus", "another process is preparing it", "wait"):
        make_corpus()
    held.close()
    make_corpus()


SCRIPT = """
import sys
from llmtrain_data.prepare import prepare
from llmtrain_data.sources import Jsonl
from llmtrain_data.tokenizer import Bpe

if __name__ == "__main__":
    prepare(
        out_dir=sys.argv[2],
        sources={"words": Jsonl(sys.argv[1])},
        tokenizer=Bpe(vocab_size=300, sample_bytes=10_000),
        val_fraction=0.1,
        shard_tokens=20_000,
        workers=2,
    )
"""


def children_of(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    with open(path) as file:
        return [int(child) for child in file.read().split()]


def test_killed_run_leaves_no_processes_and_continues(tmp_path, make_corpus, texts, bpe):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in texts * 4))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        progress = tmp_path / "killed.partial" / "progress.jsonl"
        while process.poll() is None and not (progress.exists() and progress.stat().st_size > 300):
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") and alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert not (tmp_path / "killed").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    make_corpus(
        out="straight",
        sources={"words": Jsonl(str(source))},
        tokenizer=type(bpe)(vocab_size=300, sample_bytes=10_000),
        shard_tokens=20_000,
    )
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "straight")


def alive(pid):
    """Whether the process runs (and is not merely waiting to be reaped)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_progress_is_on_the_console(make_corpus, capsys):
    make_corpus()
    shown = capsys.readouterr().err
    for part in ("reading: 300 documents", "tokenizer, from", "tokenizing with 1 process", "MB/s"):
        assert part in shown


def test_a_tokenizer_that_is_not_exact_is_warned_about(tmp_path, make_corpus, caplog, listed):
    vocab = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a"]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        make_corpus(tokenizer=Existing(path=str(tmp_path)), val_fraction=0)
    assert "normalises text or adds blanks" in caplog.text


def test_report(tmp_path, make_corpus, monkeypatch, capsys):
    manifest = make_corpus(shard_tokens=2000)
    corpus = str(tmp_path / "corpus")
    shown = report(corpus, show=1, verify=True)
    assert f"fingerprint {manifest.fingerprint}, every hash verified" in shown
    first = next(documents(tmp_path / "corpus", "train"))
    assert repr("<|endoftext|>" + first)[1:60] in shown
    monkeypatch.setattr(sys, "argv", ["inspect", corpus])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["inspect", corpus + "x"])
    assert main() == 2
    assert "cannot read manifest.json" in capsys.readouterr().err


def test_verify_finds_one_flipped_bit(tmp_path, make_corpus, message):
    make_corpus(shard_tokens=2000)
    path = tmp_path / "corpus" / "train" / "words" / "shard-00003.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    Manifest.load(tmp_path / "corpus")
    with message("shard-00003.bin", "sha256", "altered"):
        verify_corpus(tmp_path / "corpus")
