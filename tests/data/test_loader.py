import shutil

import numpy as np
import pytest
import torch
from llmtrain_data.manifest import Manifest, verify_corpus

from llmtrain.data.loader import Prefetcher, TokenLoader

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def stream_of(sources, name):
    """All tokens of a source, and the places where its documents begin."""
    tokens = [token for document in sources[name] for token in document]
    begins = np.cumsum([0, *(len(document) for document in sources[name])])[:-1]
    return tokens, set(begins.tolist())


def open_train(corpus, seq_len=16, **changes):
    return TokenLoader.open(corpus[0], "train", **{"seq_len": seq_len, "seed": 0, **changes})


def joined(batches, field):
    return torch.cat([getattr(batch, field) for batch in batches])


@pytest.mark.parametrize("seq_len", [1, 5, 16, 40, 64])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_rows_are_the_documented_ones(corpus, seq_len, weights):
    """Row j of a source is tokens [j*T, j*T + T] of its stream, filled up with weight 0."""
    if weights and seq_len >= 41:
        weights = None
    loader = open_train(corpus, seq_len, weights=weights)
    count = 2 * loader.rows_per_epoch + 3
    batch = loader.batch(0, count)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.weights_BT.dtype == torch.float32
    for index, (name, row) in enumerate(loader.samples(0, count)):
        tokens, begins = stream_of(corpus[1], name)
        window = tokens[row * seq_len : row * seq_len + seq_len + 1]
        size = len(window) - 1
        filling = [0] * (seq_len - size)
        assert batch.targets_BT[index].tolist() == window[1:] + filling
        assert batch.tokens_BT[index].tolist() == (window + filling)[:seq_len]
        assert batch.weights_BT[index].tolist() == [1.0] * size + [0.0] * len(filling)
        real = min(len(window), seq_len)
        starts = [row * seq_len + place in begins for place in range(real)]
        starts += [place == len(window) for place in range(real, seq_len)]
        assert batch.doc_starts_BT[index].tolist() == starts


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("mask_documents", [True, False])
def test_global_batches_do_not_depend_on_ranks_or_resuming(corpus, world, weights, mask_documents):
    """Every world size and every start sees the rows of the same global batches."""
    steps, rows = 9, 12
    loader = open_train(corpus, weights=weights)
    whole = loader.batch(0, steps * rows)
    for start in range(steps):
        seen = [[] for _ in range(steps - start)]
        for rank in range(world):
            with Prefetcher(
                open_train(corpus, weights=weights),
                start_step=start,
                global_rows=rows,
                rank=rank,
                world=world,
                micro_rows=2,
                mask_documents=mask_documents,
                device="cpu",
                stop_step=steps,
            ) as batches:
                for step, micros in enumerate(batches):
                    assert len(micros) == rows // world // 2
                    assert all(micro.ctx.is_dense != mask_documents for micro in micros)
                    seen[step] += micros
        for field in ("tokens_BT", "targets_BT", "weights_BT"):
            for step, micros in enumerate(seen):
                first = (start + step) * rows
                wanted = getattr(whole, field)[first : first + rows]
                assert torch.equal(joined(micros, field), wanted)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("resume", [0, 1, 3, 6])
def test_no_token_is_lost_or_read_twice(corpus, world, resume):
    """Over an epoch every token but a stream's first is a target once, whoever reads it, also when
    the run is stopped and continued with another number of ranks."""
    loader = open_train(corpus)
    rows = 6
    steps = loader.rows_per_epoch // rows
    assert loader.rows_per_epoch == rows * steps == 48
    settings = {"global_rows": rows, "micro_rows": 1, "mask_documents": True, "device": "cpu"}
    read = []
    for start, stop, ranks in ((0, resume, 2), (resume, steps, world)):
        for rank in range(ranks):
            with Prefetcher(
                loader, start_step=start, stop_step=stop, rank=rank, world=ranks, **settings
            ) as batches:
                for micros in batches:
                    for micro in micros:
                        read += micro.targets_BT[micro.weights_BT > 0].tolist()
    expected = [token for name in corpus[1] for token in stream_of(corpus[1], name)[0][1:]]
    assert sorted(read) == expected


def test_weighted_epochs_lose_nothing_either(corpus):
    loader = open_train(corpus, weights=WEIGHTS)
    batch = loader.batch(0, 2000)
    by_source = {name: [] for name in WEIGHTS}
    for index, (name, _) in enumerate(loader.samples(0, 2000)):
        by_source[name] += batch.targets_BT[index][batch.weights_BT[index] > 0].tolist()
    for name, targets in by_source.items():
        counts = np.unique(targets, return_counts=True)[1]
        assert len(counts) == len(stream_of(corpus[1], name)[0]) - 1
        assert counts.max() - counts.min() <= 1


def test_packed_contexts_follow_the_documents(corpus):
    loader = open_train(corpus)
    with Prefetcher(
        loader,
        start_step=0,
        global_rows=8,
        rank=0,
        world=1,
        micro_rows=8,
        mask_documents=True,
        device="cpu",
    ) as batches:
        (micro,) = next(batches)
    batch = loader.batch(0, 8)
    assert micro.ctx.max_seqlen == 16
    for row in range(8):
        starts = batch.doc_starts_BT[row].tolist()
        document = position = -1
        for place, begins in enumerate(starts):
            new = begins or place == 0
            document += new
            position = 0 if new else position + 1
            assert micro.ctx.doc_ids_BT[row, place] == document
            assert micro.ctx.positions_BT[row, place] == position


def test_identity_of_the_stream(corpus):
    base = open_train(corpus)
    assert base.stream_hash == open_train(corpus).stream_hash
    assert base.fingerprint == Manifest.load(corpus[0]).fingerprint
    assert (base.vocab_size, base.rows_per_epoch) == (1000, 36 + 9 + 3)
    others = [
        open_train(corpus, seed=1),
        open_train(corpus, 15),
        open_train(corpus, weights=WEIGHTS),
        open_train(corpus, weights={**WEIGHTS, "c": 0.6}),
        TokenLoader.open(corpus[0], "val", seq_len=16, seed=0),
    ]
    assert len({base.stream_hash, *(other.stream_hash for other in others)}) == 6
    first = base.batch(0, 40).tokens_BT
    assert not torch.equal(first, others[0].batch(0, 40).tokens_BT)
    assert not torch.equal(first[:2], others[2].batch(0, 2).tokens_BT)


def test_token_bytes(corpus):
    token_bytes = open_train(corpus).token_bytes
    assert token_bytes.dtype == torch.int64
    assert token_bytes.shape == (1000,)


@pytest.fixture
def copied(corpus, tmp_path):
    """A corpus to damage, and its first shard."""
    shutil.copytree(corpus[0], tmp_path / "corpus")
    return tmp_path / "corpus", tmp_path / "corpus" / "train" / "a" / "shard-00000.bin"


def open_copy(root, **changes):
    return TokenLoader.open(root, **{"split": "train", "seq_len": 16, "seed": 0, **changes})


def test_no_corpus(tmp_path, message):
    with message(str(tmp_path), "manifest.json", "No such file", "llmtrain prep", "data.name"):
        open_copy(tmp_path)


def test_no_such_split(copied, message):
    with message("no split 'test'", "it has train, val", "val_fraction"):
        open_copy(copied[0], split="test")


def test_damaged_manifest(copied, message):
    (copied[0] / "manifest.json").write_text('{"format": 1, ')
    with message("manifest.json", "not JSON", "overwrite=true"):
        open_copy(copied[0])
    (copied[0] / "manifest.json").write_text('{"format": 7}')
    with message("manifest.json", "format 7", "expected 1"):
        open_copy(copied[0])


def test_altered_manifest(copied, message):
    path = copied[0] / "manifest.json"
    known = Manifest.load(copied[0]).splits["train"]["a"].shards[0].sha256
    path.write_text(path.read_text().replace(known, "0" * 64))
    with message("manifest.json", "fingerprint", "altered", "overwrite=true"):
        open_copy(copied[0])


def test_another_tokenizer(copied, message):
    (copied[0] / "tokenizer.json").write_text("{}")
    with message("tokenizer.json", "sha256", "not the tokenizer that made the shards", "original"):
        open_copy(copied[0])
    (copied[0] / "tokenizer.json").unlink()
    with message("tokenizer.json", "cannot be read"):
        open_copy(copied[0])


def test_truncated_shard(copied, message):
    root, shard = copied
    shard.write_bytes(shard.read_bytes()[:-10])
    with message("train/a/shard-00000.bin", "bytes, expected", "truncated", "overwrite=true"):
        open_copy(root)


def test_missing_shard(copied, message):
    copied[1].unlink()
    with message("train/a/shard-00000.bin", "cannot be opened"):
        open_copy(copied[0])


def test_shard_of_another_corpus(copied, message):
    root, shard = copied
    shutil.copy(shard.with_name("shard-00001.bin"), shard)
    with message("train/a/shard-00000.bin", "expected", "by the manifest", "not belong"):
        open_copy(root)


@pytest.mark.parametrize(("offset", "what"), [(40, "sha256"), (70, "sha256 of the tokenizer")])
def test_altered_header(copied, message, offset, what):
    root, shard = copied
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    with message("shard-00000.bin", what, "by the manifest"):
        open_copy(root)


def test_altered_tokens_are_found_by_verifying(copied, message):
    root, shard = copied
    content = bytearray(shard.read_bytes())
    content[130] ^= 1
    shard.write_bytes(content)
    open_copy(root)
    with message("shard-00000.bin", "sha256", "altered since"):
        verify_corpus(root)


def test_token_bytes_missing_or_of_another_vocabulary(copied, message):
    root = copied[0]
    np.save(root / "token_bytes.npy", np.ones(7, dtype=np.int32))
    with message("token_bytes.npy", "shape (7,)", "expected (1000,)"):
        open_copy(root)
    (root / "token_bytes.npy").unlink()
    with message("token_bytes.npy", "cannot be read"):
        open_copy(root)


def test_context_longer_than_the_data(corpus, message):
    assert open_train(corpus, 567).rows_per_epoch == 3
    with message("'train'", "seq_len=568", "'a', has 568 tokens", "at least 569", "lower"):
        open_train(corpus, 568)
    with message("seq_len=41", "the shortest source, 'c', has 41 tokens"):
        open_train(corpus, 41, weights=WEIGHTS)
    with message("seq_len=0", "at least 1"):
        open_train(corpus, 0)


def test_weights_of_other_sources(corpus, message):
    with message("data.weights", "unknown source 'd'", "a, b, c"):
        open_train(corpus, weights={**WEIGHTS, "d": 1.0})
