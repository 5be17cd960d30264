"""A corpus of random tokens, made on the spot: benchmarks need no data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from llmtrain_data.manifest import (
    FORMAT,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    Manifest,
    SourceShards,
    fingerprint,
)
from llmtrain_data.shards import ShardWriter, token_dtype
from llmtrain_data.tokenizer import Bpe

TOKENIZER = b'{"note": "random tokens stand for no text"}'
TOKENS_PER_DOCUMENT = 1000  # on average


def write_random(folder: Path, *, vocab_size: int, tokens: int, seed: int = 0) -> None:
    """A prepared corpus at folder, of one source, without held-out text."""
    draw = np.random.default_rng(seed)
    source = folder / "train" / "random"
    source.mkdir(parents=True)
    (folder / TOKENIZER_FILE).write_bytes(TOKENIZER)
    np.save(folder / TOKEN_BYTES_FILE, np.full(vocab_size, 4, dtype=np.int64))
    sha256, dtype = hashlib.sha256(TOKENIZER).hexdigest(), token_dtype(vocab_size)
    writer = ShardWriter(source / "shard-00000.bin", dtype=dtype, tokenizer_sha256=sha256)
    while writer.tokens < tokens:
        length = int(draw.integers(TOKENS_PER_DOCUMENT // 2, TOKENS_PER_DOCUMENT * 3 // 2))
        writer.begin_document()
        document_T = draw.integers(vocab_size, size=length).astype(dtype)
        writer.append(document_T, 4 * length)
    splits = {"train": {"random": SourceShards.of([writer.close()])}}
    Manifest(
        format=FORMAT,
        fingerprint=fingerprint(sha256, splits),
        tokenizer_sha256=sha256,
        vocab_size=vocab_size,
        eot="<|endoftext|>",
        eot_id=0,
        splits=splits,
        request={"tokenizer": Bpe(vocab_size=vocab_size).describe()},  # as train's default asks for
    ).save(folder)
