"""The shard file: tokens of whole documents, memory-mapped. Format: docs/data_format.md.

    header (128 bytes) | tokens uint16 or uint32 [n] | zeros to a multiple of 8 | starts int64 [N+1]

starts[d] is the index of document d's first token, starts[N] = n. A shard appears under its name
only when it is whole: it is written beside, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"LLMTOKS\0"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s32s")  # magic, version, itemsize, tokens, documents, 2 x sha256
HEADER_BYTES = 128
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
REPAIR = "prepare the corpus again (llmtrain prep with overwrite=true) or copy it again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id below vocab_size."""
    return DTYPES[2 if vocab_size <= 1 << 16 else 4]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest keeps of a shard. sha256: of everything after the header; bytes: UTF-8
    bytes of the text."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@contextlib.contextmanager
def explained(path: Path, left_behind: str) -> Iterator[None]:
    """Turn a failed write into a ValueError that says what is left and how to go on."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror or error}); {left_behind}; make room or "
            "fix the permissions of the directory, then run the same command again"
        ) from error


def sync_directory(path: Path) -> None:
    """Make renames inside path durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, sync, rename: path holds its old content or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


class ShardWriter:
    """Appends documents to one shard. Nothing is at `path` before close(); abort() leaves nothing.

    tokenizer_sha256: hex, of the tokenizer.json that made the tokens.
    """

    def __init__(self, path: Path, *, dtype: np.dtype, tokenizer_sha256: str):
        self.path = path
        self.dtype = dtype
        self.tokenizer_sha256 = tokenizer_sha256
        self.tokens = 0
        self.text_bytes = 0
        self.starts: list[int] = []
        self._hash = hashlib.sha256()
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    @property
    def documents(self) -> int:
        return len(self.starts)

    def begin_document(self) -> None:
        """The next tokens belong to a new document."""
        self.starts.append(self.tokens)

    def append(self, tokens_T: np.ndarray, text_bytes: int) -> None:
        """More tokens of the current document; text_bytes: the bytes of text they stand for."""
        assert self.starts, "begin_document first"
        assert tokens_T.dtype == self.dtype, (tokens_T.dtype, self.dtype)
        self._put(tokens_T.tobytes())
        self.tokens += len(tokens_T)
        self.text_bytes += text_bytes

    def close(self) -> ShardInfo:
        """Finish, sync and rename."""
        self._put(bytes(-self.tokens * self.dtype.itemsize % 8))
        self._put(np.asarray([*self.starts, self.tokens], dtype="<i8").tobytes())
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self.dtype.itemsize,
            self.tokens,
            self.documents,
            self._hash.digest(),
            bytes.fromhex(self.tokenizer_sha256),
        )
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)
        return ShardInfo(
            file=self.path.name,
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.text_bytes,
            sha256=self._hash.hexdigest(),
        )

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard opened for reading. tokens: [n], starts: int64 [N+1]; both are views of the file."""

    path: Path
    tokens: np.ndarray
    starts: np.ndarray
    sha256: str
    tokenizer_sha256: str

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map the file. Checks magic, version and size; raises ValueError naming what differs."""
        header = read_header(path)
        magic, version, itemsize, tokens, documents, sha256, tokenizer_sha256 = header
        if magic != MAGIC:
            raise ValueError(
                f"shard {path}: starts with {magic!r}, expected {MAGIC!r}: not a shard, or "
                f"damaged; {REPAIR}"
            )
        if version != VERSION or itemsize not in DTYPES:
            raise ValueError(
                f"shard {path}: format version {version}, {itemsize} bytes a token; expected "
                f"version {VERSION} and one of {list(DTYPES)} bytes; {REPAIR}"
            )
        starts_at = HEADER_BYTES + (tokens * itemsize + 7) // 8 * 8
        expected = starts_at + 8 * (documents + 1)
        size = path.stat().st_size
        if size != expected:
            raise ValueError(
                f"shard {path}: {size} bytes, expected {expected} for its {tokens} tokens and "
                f"{documents} documents: truncated or altered; {REPAIR}"
            )
        # A plain array over the map: slices of np.memmap itself cost microseconds each.
        content = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        tokens_end = HEADER_BYTES + tokens * itemsize
        return cls(
            path=path,
            tokens=content[HEADER_BYTES:tokens_end].view(DTYPES[itemsize]),
            starts=content[starts_at:].view("<i8"),
            sha256=sha256.hex(),
            tokenizer_sha256=tokenizer_sha256.hex(),
        )

    def verify(self) -> None:
        """Read the whole file and compare its hash; raises ValueError when it differs."""
        actual = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(1 << 22):
                actual.update(block)
        if actual.hexdigest() != self.sha256:
            raise ValueError(
                f"shard {self.path}: content has sha256 {actual.hexdigest()[:16]}, expected "
                f"{self.sha256[:16]}: altered since it was written; {REPAIR}"
            )


def read_header(path: Path) -> tuple:
    """The fields of HEADER. Raises ValueError when the file is absent or shorter than a header."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise ValueError(
            f"shard {path}: cannot be opened ({error.strerror}); expected a file that the "
            f"manifest lists; {REPAIR}"
        ) from error
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"shard {path}: {len(header)} bytes, expected at least {HEADER_BYTES}: truncated; "
            f"{REPAIR}"
        )
    return HEADER.unpack_from(header)
