"""Raw text to a corpus: tokenizer, token shards, manifest.

One pass over the documents draws the sample that the tokenizer is trained on (none for an existing
tokenizer), one pass encodes and writes. A document belongs to the validation split by the hash of
its content, or because a validation source has it; never to both splits.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmtrain_data.documents import Source, digest
from llmtrain_data.encode import SEGMENT_CHARS, Segment, cut, encode_segments
from llmtrain_data.manifest import (
    FORMAT,
    TOKEN_BYTES_FILE,
    TOKENIZER_FILE,
    Manifest,
    SourceShards,
    fingerprint,
)
from llmtrain_data.partial import CorpusWriter, Partial, Skipper, Target
from llmtrain_data.progress import Progress, heartbeat
from llmtrain_data.request import (
    check_existing,
    check_not_empty,
    check_replaceable,
    check_settings,
    describe_request,
)
from llmtrain_data.sample import Sample
from llmtrain_data.shards import explained, token_dtype, write_atomic
from llmtrain_data.tokenizer import (
    TokenizerSpec,
    is_plain_byte_level,
    load_tokenizer,
    token_bytes,
    vocab_span,
)

log = logging.getLogger(__name__)


def prepare(
    *,
    out_dir: str | Path,
    sources: Mapping[str, Source],
    tokenizer: TokenizerSpec,
    val_sources: Mapping[str, Source] | None = None,
    val_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Make the corpus out_dir, or find it already made from the same request.

    sources, val_sources: name -> source. val_fraction: share of documents held out by hash; 0 with
    val_sources. shard_tokens: size at which a shard ends. workers: processes; None: one a core.
    Raises ValueError for bad settings and documents, for an unwritable or full disk (the same call
    continues later), and for an out_dir made from something else unless overwrite.
    """
    val_sources = dict(val_sources or {})
    check_settings(sources, val_sources, val_fraction, shard_tokens, workers)
    for group, given in (("sources", sources), ("val_sources", val_sources)):
        for name, source in given.items():
            check_not_empty(f"data.{group}.{name}", source)
    request = describe_request(sources, val_sources, tokenizer, val_fraction, shard_tokens)
    corpus = Path(out_dir)
    if corpus.exists():
        check_replaceable(corpus)
        if not overwrite:
            manifest = check_existing(corpus, request)
            say(f"already prepared: {summary(corpus, manifest)}")
            return manifest
    partial = Partial(corpus, request)
    try:
        job = Job(
            partial=partial,
            sources=sources,
            val_sources=val_sources,
            val_fraction=val_fraction,
            spec=tokenizer,
            shard_tokens=shard_tokens,
            workers=workers or len(os.sched_getaffinity(0)),
        )
        manifest = job.run(request)
        partial.finish()
    finally:
        partial.close()
    say(f"prepared: {summary(corpus, manifest)}")
    return manifest


@dataclass(kw_only=True)
class Job:
    """One run over the documents of a request."""

    partial: Partial
    sources: Mapping[str, Source]
    val_sources: Mapping[str, Source]
    val_fraction: float
    spec: TokenizerSpec
    shard_tokens: int
    workers: int
    held_out: frozenset[bytes] = frozenset()  # digests of the documents of val_sources
    total_bytes: int = 0  # of text, known after a pass that samples

    def run(self, request: dict[str, Any]) -> Manifest:
        self.held_out = frozenset(
            digest(data) for source in self.val_sources.values() for _, data in texts_of(source)
        )
        content = self.build_tokenizer()
        sha256 = hashlib.sha256(content).hexdigest()
        tokenizer = load_tokenizer(self.partial.root)
        eot = self.spec.document_token(tokenizer)
        self.write_tokenizer_files(tokenizer, eot)
        vocab_size = vocab_span(tokenizer)
        writer = CorpusWriter(
            self.partial,
            dtype=token_dtype(vocab_size),
            eot_id=tokenizer.token_to_id(eot),
            tokenizer_sha256=sha256,
            shard_tokens=self.shard_tokens,
        )
        self.encode(writer, sha256, segment_limit(tokenizer))
        splits = self.splits()
        manifest = Manifest(
            format=FORMAT,
            fingerprint=fingerprint(sha256, splits),
            tokenizer_sha256=sha256,
            vocab_size=vocab_size,
            eot=eot,
            eot_id=tokenizer.token_to_id(eot),
            splits=splits,
            request=request,
        )
        with explained(self.partial.root, self.partial.left_behind):
            manifest.save(self.partial.root)
        return manifest

    def documents(self) -> Iterator[tuple[Target, str, bytes, bytes]]:
        """(target, text, its UTF-8, its digest) of every document, in writing order."""
        for name, source in self.val_sources.items():
            for text, data in texts_of(source):
                yield ("val", name), text, data, digest(data)
        limit = int(self.val_fraction * (1 << 64))
        repeated = 0
        for name, source in self.sources.items():
            for text, data in texts_of(source):
                content = digest(data)
                if content in self.held_out:
                    repeated += 1
                    continue
                split = "val" if int.from_bytes(content[:8], "little") < limit else "train"
                yield (split, name), text, data, content
        if repeated:
            log.info("left %d documents out of training that val_sources have", repeated)

    def build_tokenizer(self) -> bytes:
        """The content of tokenizer.json, built now or by the run that was interrupted."""
        path = self.partial.root / TOKENIZER_FILE
        if path.is_file():
            return path.read_bytes()
        texts: list[str] = []
        if self.spec.sample_bytes:
            texts = self.sample()
        with heartbeat(f"tokenizer, from {sum(map(len, texts)) / 1e6:,.1f} M characters of text"):
            content = self.spec.build(texts)
        with explained(path, "nothing was written"):
            write_atomic(path, content)
        return content

    def sample(self) -> list[str]:
        """Training text, in a pass that also tells early whether both splits have documents."""
        sample = Sample(self.spec.sample_bytes)
        progress = Progress("reading")
        counts: Counter[str] = Counter()
        for (split, _), text, data, content in self.documents():
            counts[split] += 1
            progress.add(documents=1, size=len(data))
            if split == "train":
                sample.add(content, text)
        progress.finish()
        self.total_bytes = progress.bytes
        self.check_splits(counts)
        return sample.texts

    def encode(self, writer: CorpusWriter, sha256: str, limit: int | None) -> None:
        progress = Progress(f"tokenizing with {self.workers} processes", total=self.total_bytes)
        results = encode_segments(
            self.segments(limit, progress),
            tokenizer_path=str(self.partial.root / TOKENIZER_FILE),
            tokenizer_sha256=sha256,
            workers=self.workers,
        )
        try:
            for encoded in results:
                writer.add(encoded)
                progress.add(
                    documents=int(encoded.segment.content is not None),
                    size=encoded.segment.bytes,
                    tokens=len(encoded.tokens_T),
                )
            writer.close()
        finally:
            results.close()
            writer.abort()
        progress.finish()

    def segments(self, limit: int | None, progress: Progress) -> Iterator[Segment]:
        """What is still to be encoded, in writing order."""
        skippers = {target: Skipper(self.partial, target) for target in self.partial.finished}
        for target, text, data, content in self.documents():
            if target in skippers and skippers[target].done(content):
                progress.skip(len(data))
                continue
            if limit is None or len(text) <= limit:
                yield Segment(text=text, bytes=len(data), target=target, content=content)
                continue
            for index, part in enumerate(cut(text, limit)):
                yield Segment(
                    text=part,
                    bytes=len(part.encode("utf-8")),
                    target=target,
                    content=None if index else content,
                )
        for skipper in skippers.values():
            skipper.finish()

    def splits(self) -> dict[str, dict[str, SourceShards]]:
        splits: dict[str, dict[str, SourceShards]] = {}
        for (split, name), shards in sorted(self.partial.finished.items()):
            infos = [shard.info for shard in shards]
            splits.setdefault(split, {})[name] = SourceShards.of(infos)
        counts = Counter(
            {split: sum(s.documents for s in sources.values()) for split, sources in splits.items()}
        )
        self.check_splits(counts)
        return splits

    def check_splits(self, counts: Counter[str]) -> None:
        if not counts["train"]:
            raise ValueError(
                f"data: all {counts['val']} documents are validation documents; expected some for "
                "training; lower data.val_fraction, or take sources that val_sources do not hold"
            )
        if self.val_fraction and not counts["val"]:
            raise ValueError(
                f"data.val_fraction={self.val_fraction}: none of {counts['train']} documents was "
                "held out; expected at least one; raise data.val_fraction, name data.val_sources, "
                "or set data.val_fraction=0 to have no validation split"
            )

    def write_tokenizer_files(self, tokenizer: Tokenizer, eot: str) -> None:
        """What `transformers` wants beside tokenizer.json, and the bytes of every token."""
        lengths = io.BytesIO()
        np.save(lengths, token_bytes(tokenizer))
        if not is_plain_byte_level(tokenizer):
            log.warning(
                "the tokenizer normalises text or adds blanks: decoding does not give back every "
                "text exactly, and bits per byte count the bytes of the tokens"
            )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eot,
            "eos_token": eot,
            "clean_up_tokenization_spaces": False,
        }
        with explained(self.partial.root, self.partial.left_behind):
            write_atomic(self.partial.root / TOKEN_BYTES_FILE, lengths.getvalue())
            write_atomic(
                self.partial.root / "tokenizer_config.json",
                (json.dumps(config, indent=1) + "\n").encode(),
            )


def texts_of(source: Source) -> Iterator[tuple[str, bytes]]:
    """(text, its UTF-8) of every document that is not empty."""
    for document in source:
        if document.text:
            yield document.text, document.text.encode("utf-8")


def segment_limit(tokenizer: Tokenizer) -> int | None:
    """Characters up to which a document is encoded in one piece; None: any number, because the
    tokenizer's tokens of two parts do not always join to the text."""
    return SEGMENT_CHARS if is_plain_byte_level(tokenizer) else None


def summary(corpus: Path, manifest: Manifest) -> str:
    parts = [
        f"{split} {sum(s.documents for s in sources.values()):,} documents, "
        f"{manifest.tokens(split) / 1e6:,.2f} M tokens"
        for split, sources in manifest.splits.items()
    ]
    return f"{corpus} ({'; '.join(parts)}; vocabulary {manifest.vocab_size:,})"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
