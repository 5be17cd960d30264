"""manifest.json: what a prepared corpus holds, and opening it with checks.

    <corpus>/manifest.json  tokenizer.json  tokenizer_config.json  token_bytes.npy
    <corpus>/<split>/<source>/shard-00000.bin ...

The fingerprint covers the tokenizer and the content of every shard, in order: two corpora with
equal fingerprints hold the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain_data.shards import REPAIR, Shard, ShardInfo, write_atomic

FORMAT = 1
FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.npy"


@dataclass(frozen=True, kw_only=True)
class SourceShards:
    """One source in one split; its stream is its shards one after another."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardInfo, ...]

    @classmethod
    def of(cls, shards: list[ShardInfo]) -> SourceShards:
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            shards=tuple(shards),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """request: what was asked for (sources, tokenizer, split), compared by a later prep.
    splits: split -> source -> shards; a source without documents in a split is absent there."""

    format: int
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eot: str
    eot_id: int
    splits: dict[str, dict[str, SourceShards]]
    request: dict[str, Any]

    def tokens(self, split: str) -> int:
        return sum(source.tokens for source in self.splits.get(split, {}).values())

    def save(self, corpus: Path) -> None:
        write_atomic(corpus / FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, corpus: str | Path) -> Manifest:
        """Raises ValueError when there is none, it is damaged, or its tokenizer was exchanged."""
        path = Path(corpus) / FILE
        try:
            fields = json.loads(path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"corpus {str(corpus)!r}: cannot read {FILE} ({error.strerror}); expected a "
                "directory made by `llmtrain prep`; run it, or set data.root and data.name"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}): damaged; {REPAIR}") from error
        if fields.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {fields.get('format')!r}, expected {FORMAT}; {REPAIR}"
            )
        splits = {
            split: {name: source_shards(entry) for name, entry in sources.items()}
            for split, sources in fields.pop("splits").items()
        }
        manifest = cls(splits=splits, **fields)
        if fingerprint(manifest.tokenizer_sha256, splits) != manifest.fingerprint:
            raise ValueError(
                f"{path}: fingerprint {manifest.fingerprint[:16]} does not follow from the hashes "
                f"in it: altered; {REPAIR}"
            )
        manifest._check_tokenizer(Path(corpus))
        return manifest

    def _check_tokenizer(self, corpus: Path) -> None:
        path = corpus / TOKENIZER_FILE
        try:
            actual = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); {REPAIR}") from error
        if actual != self.tokenizer_sha256:
            raise ValueError(
                f"{path}: sha256 {actual[:16]}, expected {self.tokenizer_sha256[:16]}: not the "
                f"tokenizer that made the shards; put the original back, or {REPAIR}"
            )


def source_shards(entry: Mapping[str, Any]) -> SourceShards:
    return SourceShards.of([ShardInfo(**shard) for shard in entry["shards"]])


def fingerprint(tokenizer_sha256: str, splits: Mapping[str, Mapping[str, SourceShards]]) -> str:
    """Hex sha256 over the tokenizer and, by split and source, the shards' hashes in order."""
    total = hashlib.sha256(tokenizer_sha256.encode())
    for split in sorted(splits):
        for name in sorted(splits[split]):
            hashes = ",".join(shard.sha256 for shard in splits[split][name].shards)
            total.update(f"\n{split}/{name}:{hashes}".encode())
    return total.hexdigest()


def open_split(corpus: str | Path, manifest: Manifest, split: str) -> dict[str, list[Shard]]:
    """Every shard of a split, by source, checked cheaply: size, header, the manifest's hash.

    Raises ValueError naming the shard and what differs, or the splits that exist.
    """
    if split not in manifest.splits:
        raise ValueError(
            f"corpus {str(corpus)!r}: no split {split!r}; it has {', '.join(manifest.splits)}; "
            "prepare it with data.val_fraction > 0 or data.val_sources to have a val split"
        )
    return {
        name: [
            open_checked(Path(corpus) / split / name / info.file, info, manifest)
            for info in source.shards
        ]
        for name, source in manifest.splits[split].items()
    }


def open_checked(path: Path, info: ShardInfo, manifest: Manifest) -> Shard:
    shard = Shard.open(path)
    for what, got, expected in (
        ("token count", len(shard.tokens), info.tokens),
        ("document count", shard.documents, info.documents),
        ("sha256", shard.sha256, info.sha256),
        ("sha256 of the tokenizer", shard.tokenizer_sha256, manifest.tokenizer_sha256),
    ):
        if got != expected:
            raise ValueError(
                f"shard {path}: {what} {got}, expected {expected} by the manifest: the shard does "
                f"not belong to this corpus or was altered; {REPAIR}"
            )
    return shard


def verify_corpus(corpus: str | Path) -> Manifest:
    """Read every byte of every shard and compare the hashes. Raises ValueError at the first
    difference."""
    manifest = Manifest.load(corpus)
    for split in manifest.splits:
        for shards in open_split(corpus, manifest, split).values():
            for shard in shards:
                shard.verify()
    return manifest
