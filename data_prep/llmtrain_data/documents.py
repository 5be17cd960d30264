"""What a source yields, and the helpers every source shares.

A source is any object that can be iterated several times, always giving the same documents in the
same order, and that describes itself: the description is what tells whether a prepared corpus is
still the one that was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ERROR_POLICIES = ("strict", "replace", "skip")
MISSING_POLICIES = ("error", "skip")


@dataclass(frozen=True, kw_only=True)
class Document:
    """text: the document, encodable as UTF-8. id: where it came from, for messages."""

    text: str
    id: str


class Source(Protocol):
    def __iter__(self) -> Iterator[Document]: ...

    def describe(self) -> dict[str, Any]:
        """JSON-able identity of the documents: settings that change them and a digest of the
        listing (names, sizes, times). Two equal descriptions mean the same documents."""
        ...


def check_choice(where: str, value: str, choices: Sequence[str]) -> str:
    """value, or ValueError naming the valid ones."""
    if value not in choices:
        raise ValueError(f"{where}: got {value!r}, expected one of {', '.join(choices)}")
    return value


def decode_utf8(data: bytes, *, where: str, errors: str, offset: int = 0) -> str | None:
    """The text of data, or None when it is not UTF-8 and errors is "skip".

    where, offset: the file, and the position in it of data's first byte, for the message.
    Raises ValueError at the first invalid byte when errors is "strict".
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "replace":
            return data.decode("utf-8", errors="replace")
        if errors == "skip":
            return None
        raise ValueError(
            f"{where}: byte {data[error.start]:#04x} at offset {offset + error.start} is not "
            "UTF-8; convert the file, or set the source's errors=replace (U+FFFD for each bad "
            "byte) or errors=skip (leave the document out)"
        ) from error


def text_of_record(
    record: Mapping[str, Any], field: str, *, where: str, errors: str, missing: str
) -> str | None:
    """record[field] as text, or None when it is to be left out.

    Raises ValueError when the field is absent or not a string (and missing is "error"), or holds
    a lone surrogate, which JSON can spell but UTF-8 cannot (and errors is "strict").
    """
    text = record.get(field)
    if not isinstance(text, str):
        if missing == "skip":
            return None
        if field not in record:
            raise ValueError(
                f"{where}: no field {field!r}; the record has {', '.join(map(repr, record))}; "
                "set the source's text_field, or missing=skip to leave such records out"
            )
        raise ValueError(
            f"{where}: field {field!r} is {type(text).__name__}, expected a string; set the "
            "source's text_field, or missing=skip to leave such records out"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "skip":
            return None
        if errors == "replace":
            return text.encode("utf-8", errors="replace").decode("utf-8")
        raise ValueError(
            f"{where}: character {error.start} of field {field!r} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which is not text; set the source's "
            "errors=replace or errors=skip"
        ) from error
    return text


def read_bytes(path: Path) -> bytes:
    """The file's content, or ValueError saying why it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path}: cannot be read ({error.strerror or error}); expected a readable file; fix its "
        "permissions or link, or leave it out of the source's patterns"
    )


def common_base(files: Sequence[Path]) -> Path:
    """The directory that all files share, so that a moved corpus keeps its description."""
    parents = [set(path.parents) for path in files]
    shared = set.intersection(*parents)
    return max(shared, key=lambda parent: len(parent.parts), default=Path())


def describe_files(files: Iterable[Path], base: Path) -> dict[str, Any]:
    """Count, bytes and digest of (path relative to base, size, modification time)."""
    listing = hashlib.sha256()
    count = size = 0
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        name = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()
        listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        count += 1
        size += stat.st_size
    return {"files": count, "bytes": size, "listing": listing.hexdigest()}


def digest(data: bytes) -> bytes:
    """16 bytes that stand for a document's content (blake2b of its UTF-8)."""
    return hashlib.blake2b(data, digest_size=16).digest()
