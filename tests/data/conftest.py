"""Corpora written directly as shards, with tokens that tell where they come from."""

import contextlib
import hashlib

import numpy as np
import pytest
from llmtrain_data.manifest import Manifest, SourceShards, fingerprint
from llmtrain_data.shards import ShardWriter, token_dtype

TOKENIZER = b'{"model": "none, the loader only compares its hash"}'


def write_corpus(root, splits, *, vocab_size, shard_documents=3):
    """splits: split -> source -> documents (lists of token ids, the first opens it)."""
    root.mkdir()
    (root / "tokenizer.json").write_bytes(TOKENIZER)
    np.save(root / "token_bytes.npy", np.ones(vocab_size, dtype=np.int32))
    sha256 = hashlib.sha256(TOKENIZER).hexdigest()
    dtype = token_dtype(vocab_size)
    listed = {}
    for split, sources in splits.items():
        for name, documents in sources.items():
            (root / split / name).mkdir(parents=True)
            infos = []
            for first in range(0, len(documents), shard_documents):
                path = root / split / name / f"shard-{len(infos):05d}.bin"
                writer = ShardWriter(path, dtype=dtype, tokenizer_sha256=sha256)
                for document in documents[first : first + shard_documents]:
                    writer.begin_document()
                    writer.append(np.array(document, dtype=dtype), len(document))
                infos.append(writer.close())
            listed.setdefault(split, {})[name] = SourceShards.of(infos)
    manifest = Manifest(
        format=1,
        fingerprint=fingerprint(sha256, listed),
        tokenizer_sha256=sha256,
        vocab_size=vocab_size,
        eot="<|endoftext|>",
        eot_id=0,
        splits=listed,
        request={},
    )
    manifest.save(root)
    return manifest


def numbered_documents(sizes, first):
    """Documents of these sizes whose tokens are first, first + 1, .. so each occurs once."""
    documents = []
    for size in sizes:
        documents.append(list(range(first, first + size)))
        first += size
    return documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(directory, {source: stream}): three sources of 568, 130 and 41 distinct tokens, a val split.

    Documents of 1 to 40 tokens, three to a shard, so rows of 16 cross documents and shards.
    """
    draw = np.random.default_rng(0)
    sources, first = {}, 1
    for name, total in (("a", 568), ("b", 130), ("c", 41)):
        sizes = []
        while sum(sizes) < total:
            sizes.append(min(int(draw.integers(1, 41)), total - sum(sizes)))
        sources[name] = numbered_documents(sizes, first)
        first += total
    root = tmp_path_factory.mktemp("data") / "corpus"
    val = {"a": numbered_documents([30, 20], first)}
    write_corpus(root, {"train": sources, "val": val}, vocab_size=1000)
    return root, sources


@pytest.fixture
def message():
    """message("part", ..): a ValueError is raised in the block, and says all the parts."""

    @contextlib.contextmanager
    def expect(*parts):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the parts are the match
            yield
        text = str(raised.value)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{text!r} does not say {missing}"

    return expect
