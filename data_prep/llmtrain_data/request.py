"""What a preparation was asked for: checked, described, compared with what exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtrain_data.documents import Source
from llmtrain_data.manifest import FILE, Manifest, open_split
from llmtrain_data.tokenizer import TokenizerSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_settings(
    sources: Mapping[str, Source],
    val_sources: Mapping[str, Source],
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    """Raises ValueError for settings that cannot be."""
    if not sources:
        raise ValueError("data.sources: empty; expected at least one source; set data.sources")
    for name in [*sources, *val_sources]:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"data.sources: name {name!r}; expected letters, digits, '.', '_', '-', as it "
                "names a directory; rename the source"
            )
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"data.val_fraction={val_fraction}; expected 0 <= val_fraction < 1; set it"
        )
    if val_sources and val_fraction:
        raise ValueError(
            f"data.val_fraction={val_fraction} with data.val_sources={list(val_sources)}: expected "
            "one of the two; set data.val_fraction=0, or drop data.val_sources"
        )
    for key, value in (("shard_tokens", shard_tokens), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"data.{key}={value}; expected at least 1; set data.{key}")


def check_not_empty(where: str, source: Source) -> None:
    """Read one document, so that a source that cannot work fails before the work starts."""
    if next(iter(source), None) is None:
        raise ValueError(
            f"{where}: no documents; expected at least one; check its paths, patterns and filters"
        )


def describe_request(
    sources: Mapping[str, Source],
    val_sources: Mapping[str, Source],
    tokenizer: TokenizerSpec,
    val_fraction: float,
    shard_tokens: int,
) -> dict[str, Any]:
    """JSON-able; two equal requests make the same corpus."""
    request = {
        "tokenizer": tokenizer.describe(),
        "sources": {name: source.describe() for name, source in sources.items()},
        "val_sources": {name: source.describe() for name, source in val_sources.items()},
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    return json.loads(json.dumps(request))


def check_existing(corpus: Path, request: dict[str, Any]) -> Manifest:
    """The manifest of a corpus that was made from this request.

    Raises ValueError when it was made from another, or is damaged.
    """
    check_replaceable(corpus)
    manifest = Manifest.load(corpus)
    changed = list(differences(manifest.request, request))
    if changed:
        raise ValueError(
            f"corpus {corpus}: exists, prepared from another request: {'; '.join(changed)}; "
            "set overwrite=true to replace it, or another data.name to keep both"
        )
    for split in manifest.splits:
        open_split(corpus, manifest, split)
    return manifest


def check_replaceable(corpus: Path) -> None:
    """Raises ValueError when the path holds something that no preparation wrote."""
    if not (corpus / FILE).is_file():
        raise ValueError(
            f"corpus {corpus}: exists, but has no {FILE}, so it is not a prepared corpus and is "
            "left alone; expected a free path; move it away, or set another data.name"
        )


def differences(have: Any, want: Any, key: str = "") -> Iterator[str]:
    """ "key: was X, asked for Y" for every leaf that differs."""
    if isinstance(have, dict) and isinstance(want, dict):
        for name in sorted({*have, *want}):
            path = f"{key}.{name}" if key else name
            yield from differences(have.get(name, "absent"), want.get(name, "absent"), path)
    elif have != want:
        yield f"{key}: was {have!r}, asked for {want!r}"
