"""Sources of records: JSON lines and Parquet, one document a record."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from llmtrain_data.documents import (
    ERROR_POLICIES,
    MISSING_POLICIES,
    Document,
    check_choice,
    common_base,
    decode_utf8,
    describe_files,
    text_of_record,
    unreadable,
)

log = logging.getLogger(__name__)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
PARQUET_BATCH_ROWS = 1024


class Jsonl:
    """One JSON object a line, plain, gzip or zstandard; the text is one of its fields.

    paths: a file, a directory (its .jsonl, .jsonl.gz, .jsonl.zst, at any depth), a glob, or a list
    of these. errors: for bytes that are not UTF-8 and lone surrogates: strict, replace, skip.
    missing: for records whose field is absent or no string: error, skip.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        text_field: str = "text",
        errors: str = "strict",
        missing: str = "error",
    ):
        self.paths = as_list(paths)
        self.text_field = text_field
        self.errors = check_choice("data source Jsonl, errors", errors, ERROR_POLICIES)
        self.missing = check_choice("data source Jsonl, missing", missing, MISSING_POLICIES)

    def describe(self) -> dict[str, Any]:
        files = expand("Jsonl", self.paths, JSONL_SUFFIXES)
        return {
            "kind": "Jsonl",
            "text_field": self.text_field,
            "errors": self.errors,
            "missing": self.missing,
            **describe_files(files, common_base(files)),
        }

    def __iter__(self) -> Iterator[Document]:
        skipped = 0
        for path in expand("Jsonl", self.paths, JSONL_SUFFIXES):
            for number, offset, line in numbered_lines(path):
                text = self._text(line, path=path, number=number, offset=offset)
                if text is None:
                    skipped += 1
                    continue
                yield Document(text=text, id=f"{path.name}:{number}")
        if skipped:
            log.warning("Jsonl: left out %d records (missing field or not UTF-8)", skipped)

    def _text(self, line: bytes, *, path: Path, number: int, offset: int) -> str | None:
        decoded = decode_utf8(line, where=str(path), errors=self.errors, offset=offset)
        if decoded is None:
            return None
        where = f"{path}, line {number}"
        try:
            record = json.loads(decoded)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); expected one object a "
                "line; repair the file, or leave it out of the source's paths"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: a JSON {type(record).__name__}, expected an object with a field "
                f"{self.text_field!r}; repair the file, or leave it out of the source's paths"
            )
        return text_of_record(
            record, self.text_field, where=where, errors=self.errors, missing=self.missing
        )


class Parquet:
    """One row a document; only the text column is read.

    paths: a file, a directory (its .parquet, at any depth), a glob, or a list of these.
    missing: for rows whose text is null: error, skip.
    """

    def __init__(
        self, paths: str | Sequence[str], *, text_field: str = "text", missing: str = "error"
    ):
        self.paths = as_list(paths)
        self.text_field = text_field
        self.missing = check_choice("data source Parquet, missing", missing, MISSING_POLICIES)

    def describe(self) -> dict[str, Any]:
        files = expand("Parquet", self.paths, PARQUET_SUFFIXES)
        return {
            "kind": "Parquet",
            "text_field": self.text_field,
            "missing": self.missing,
            **describe_files(files, common_base(files)),
        }

    def __iter__(self) -> Iterator[Document]:
        skipped = 0
        for path in expand("Parquet", self.paths, PARQUET_SUFFIXES):
            for number, value in enumerate(self._values(path)):
                text = text_of_record(
                    {self.text_field: value},
                    self.text_field,
                    where=f"{path}, row {number}",
                    errors="strict",
                    missing=self.missing,
                )
                if text is None:
                    skipped += 1
                    continue
                yield Document(text=text, id=f"{path.name}:{number}")
        if skipped:
            log.warning("Parquet: left out %d rows without text", skipped)

    def _values(self, path: Path) -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                if self.text_field not in columns:
                    raise ValueError(
                        f"{path}: no column {self.text_field!r}; the file has "
                        f"{', '.join(map(repr, columns))}; set the source's text_field"
                    )
                batches = file.iter_batches(PARQUET_BATCH_ROWS, columns=[self.text_field])
                for batch in batches:
                    yield from batch.column(0).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{path}: not a readable Parquet file ({error}); write it again, or leave it out "
                "of the source's paths"
            ) from error
        except OSError as error:
            raise unreadable(path, error) from error


def as_list(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def expand(kind: str, paths: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that the paths name, sorted, each once. Raises ValueError for a path without."""
    files: set[Path] = set()
    for item in paths:
        if Path(item).is_dir():
            found = [p for p in Path(item).rglob("*") if p.is_file() and ends(p, suffixes)]
        else:
            found = [Path(p) for p in glob.glob(item, recursive=True) if Path(p).is_file()]
        if not found:
            raise ValueError(
                f"data source {kind}: no file matches {item!r}; expected a file, a glob, or a "
                f"directory holding {', '.join('*' + s for s in suffixes)}; set the source's paths"
            )
        files.update(found)
    if not files:
        raise ValueError(f"data source {kind}: paths is empty; expected at least one path")
    return sorted(files)


def ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.endswith(tuple(suffixes))


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset in the decompressed file, line), empty lines left out."""
    offset = 0
    try:
        with open_decompressed(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path}: damaged or truncated compressed file ({error}), after {offset} readable "
            "bytes; fetch or write it again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def open_decompressed(path: Path) -> BinaryIO:
    """A binary file of the decompressed content, by the name's last suffix."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(ZstdReader(path.open("rb")), buffer_size=1 << 20)
    return path.open("rb")


class ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames.

    zstandard's own stream_reader ends without a word where a file is cut off; this one raises
    EOFError, as gzip does.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.inside_frame = False
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.ready:
            data = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
                self.inside_frame = False
            data = data or self.file.read(1 << 17)
            if not data:
                if self.inside_frame:
                    raise EOFError("the last frame is cut off")
                return 0
            self.inside_frame = True
            self.ready = memoryview(self.frame.decompress(data))
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready = self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
