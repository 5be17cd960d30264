"""The tensors of a checkpoint: 1-D fragments in the safetensors files of its ranks.

A file is eight bytes of header length, a JSON header (key -> dtype, shape, place of the data), and
the data. Keys are "<kind>|<name>|<offset>"; what belongs to a rank has its number for a name.
Pieces are read from the files straight into the tensors that want them, by several threads; chunks
that are to be verified are hashed from what the tensors got, so that each byte is read once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.manifest import (
    READ_BYTES,
    THREADS,
    BadCheckpoint,
    Chunk,
    Manifest,
    firsts,
    mismatch,
    read_manifest,
)

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 2**30
# What a thread reads at once: that many bytes of a file, into at most that many tensors.
BATCH_BYTES = 16 * 2**20
BATCH_PARTS = 1000


# Tuples, as there may be a hundred thousand of them.
class Piece(NamedTuple):
    """A fragment in a file: elements of a flattened tensor from offset on, at byte start."""

    offset: int
    elements: int
    file: str
    start: int
    dtype: torch.dtype


class Part(NamedTuple):
    """Bytes of a file that make up a tensor; dtype: as stored; buffer: the tensor's memory, None
    if bytes have to be converted or brought to a device."""

    file: str
    start: int
    end: int
    out: Tensor
    dtype: torch.dtype
    buffer: memoryview | None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """out (1-D) is to hold the elements from offset on of what is stored of a parameter."""

    kind: str
    name: str
    offset: int
    out: Tensor


def read_header(file: Path) -> Iterator[tuple[str, torch.dtype, int, int]]:
    """(key, dtype, elements, byte in the file) of each tensor. ValueError when it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise ValueError(f"its header cannot have {length} bytes")
        header = json.loads(opened.read(length))
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype, elements = DTYPES[entry["dtype"]], math.prod(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != elements * dtype.itemsize or not 0 <= start <= end <= size - 8 - length:
            raise ValueError(f"{key} cannot lie at the bytes {start} to {end}")
        yield key, dtype, elements, 8 + length + start


def read_index(path: Path, manifest: Manifest) -> dict[tuple[str, str], list[Piece]]:
    """(kind, name) -> its pieces in the order of their offsets."""
    index: dict[tuple[str, str], list[Piece]] = {}
    for file in manifest.rank_files:
        try:
            for key, dtype, elements, start in read_header(path / file):
                kind, name, offset = key.split("|")
                piece = Piece(int(offset), elements, file, start, dtype)
                index.setdefault((kind, name), []).append(piece)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise BadCheckpoint(
                f"checkpoint {path}: cannot read {file}: {error}; use another checkpoint"
            ) from error
    for pieces in index.values():
        pieces.sort(key=itemgetter(0, 1))
    return index


def uncovered(manifest: Manifest, index: dict[tuple[str, str], list[Piece]]) -> list[str]:
    """What the fragments lack: every tensor of every kind is to be there once, and nothing else."""
    found = []
    stored: dict[str, set[str]] = {}
    for kind, name in index:
        if not name.isdigit():
            stored.setdefault(name, set()).add(kind)
    for name in sorted(stored.keys() - manifest.parameters.keys()):
        found.append(f"{name} is stored, but not in manifest.json")
    for name, shape in manifest.parameters.items():
        there = stored.get(name, set())
        kinds = there | {"param"} if manifest.kinds is None else set(manifest.kinds.get(name, ()))
        found += [f"{kind} of {name} is stored, but not in manifest.json" for kind in there - kinds]
        for kind in sorted(kinds):
            end = 0
            for piece in index.get((kind, name), ()):
                if piece.offset != end:
                    what = "twice" if piece.offset < end else "nowhere"
                    low, high = sorted((piece.offset, end))
                    found.append(f"{kind} of {name}: elements {low} to {high} are stored {what}")
                end = max(end, piece.offset + piece.elements)
            if end != math.prod(shape):
                found.append(f"{kind} of {name}: got {end} elements, expected {math.prod(shape)}")
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.view(torch.uint8)
    return memoryview(tensor.detach().numpy()).cast("B")


def receiving(parts: list[Part]) -> tuple[list[memoryview], list[tuple[Tensor, Tensor]]]:
    """(memory that takes each part's bytes, (out, tensor in that memory) where it is not out's)."""
    buffers, copies = [], []
    for part in parts:
        buffer = part.buffer
        if buffer is None:
            into = torch.empty(part.out.shape, dtype=part.dtype)
            copies.append((part.out, into))
            buffer = bytes_of(into)
        buffers.append(buffer)
    return buffers, copies


def pieces_of(
    chunk: Chunk, parts: list[Part], buffers: list[memoryview]
) -> Iterator[tuple[memoryview | None, int]]:
    """All of a chunk in order, (memory, its bytes) of READ_BYTES at most; None: nobody wants it."""
    at = chunk.start
    for part, buffer in zip(parts, buffers):
        for start in range(at, part.start, READ_BYTES):
            yield None, min(READ_BYTES, part.start - start)
        for start in range(0, len(buffer), READ_BYTES):
            cut = buffer[start : start + READ_BYTES]
            yield cut, len(cut)
        at = part.end
    for start in range(at, chunk.start + chunk.size, READ_BYTES):
        yield None, min(READ_BYTES, chunk.start + chunk.size - start)


def check_parameters(path: Path, manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the checkpoint holds exactly these parameters."""
    stored = {name: tuple(shape) for name, shape in manifest.parameters.items()}
    if stored == shapes:
        return
    missing, unknown = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
    problems = [f"{name} is not in it" for name in sorted(missing)]
    problems += [f"{name} is not in the model" for name in sorted(unknown)]
    problems += [
        f"{name} is {list(stored[name])} in it, {list(shapes[name])} in the model"
        for name in sorted(stored.keys() & shapes.keys())
        if stored[name] != shapes[name]
    ]
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
    raise ValueError(
        f"checkpoint {path}: its parameters are not the model's: {shown}; use the "
        "configuration that it was trained with (config.yaml beside its manifest)"
    )


def close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class FragmentReader:
    """Random access to the fragments of a checkpoint, over all its rank files."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        # format 1: a chunk is a whole file
        self.chunk_bytes = (
            self.manifest.chunk_bytes if self.manifest.format > 1 else self.manifest.size + 1
        )
        self.index = read_index(self.path, self.manifest)
        self.files = {
            name: os.open(self.path / name, os.O_RDONLY) for name in self.manifest.rank_files
        }
        weakref.finalize(self, close_all, self.files)

    def read(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        """Fill out (1-D view) with elements offset .. offset + len(out) of a flattened tensor."""
        self.read_all([Wanted(kind=kind, name=name, offset=offset, out=out)])

    @torch.no_grad()
    def read_all(self, wanted: Iterable[Wanted], verified: Sequence[Chunk] = ()) -> dict[str, str]:
        """Fill all of these tensors, in the order of the files, by several threads.

        verified: chunks that are read as a whole and hashed, whatever of them is wanted. Returns
        file name -> what is wrong with it; if anything is, the tensors are not to be used.
        """
        parts = [part for entry in wanted for part in self.parts(entry)]
        parts.sort(key=itemgetter(0, 1))
        of_chunk: dict[tuple[str, int], list[Part]] = {(c.file, c.start): [] for c in verified}
        batches: list[list[Part]] = []
        for part in parts:
            place = part.file, part.start - part.start % self.chunk_bytes
            inside = of_chunk.get(place)
            free = inside is not None and (not inside or inside[-1].end <= part.start)
            if free and part.end <= place[1] + self.chunk_bytes:  # no element across chunks
                inside.append(part)
                continue
            last = batches[-1] if batches else None
            follows = last and (last[-1].file, last[-1].end) == (part.file, part.start)
            fits = last and len(last) < BATCH_PARTS and part.end - last[0].start <= BATCH_BYTES
            if follows and fits:
                last.append(part)
            else:
                batches.append([part])
        if not verified and len(batches) == 1:
            self.fill(batches[0])
            return {}
        with ThreadPoolExecutor(THREADS) as pool:
            wrong = pool.map(self.fill_verified, verified, of_chunk.values())
            list(pool.map(self.fill, batches))
            return firsts(verified, wrong)

    def parts(self, wanted: Wanted) -> Iterator[Part]:
        """Where the elements lie, BATCH_BYTES at most each, and in one chunk."""
        out, offset, filled = wanted.out, wanted.offset, 0
        end = offset + out.numel()
        for piece in self.index.get((wanted.kind, wanted.name), ()):
            start, high = max(offset, piece.offset), min(end, piece.offset + piece.elements)
            width = piece.dtype.itemsize
            while start < high:
                byte = piece.start + (start - piece.offset) * width
                room = min(BATCH_BYTES, self.chunk_bytes - byte % self.chunk_bytes)
                stop = min(high, start + max(room // width, 1))
                end_byte = byte + (stop - start) * width
                into = (
                    out if (start, stop) == (offset, end) else out[start - offset : stop - offset]
                )
                direct = out.device.type == "cpu" and out.dtype == piece.dtype
                buffer = bytes_of(into) if direct and into.is_contiguous() else None
                yield Part(piece.file, byte, end_byte, into, piece.dtype, buffer)
                filled += stop - start
                start = stop
        if filled != out.numel():
            raise BadCheckpoint(
                f"checkpoint {self.path}: {wanted.kind} of {wanted.name}: got {filled} of the "
                f"elements {offset} .. {end}, expected all; a rank's file is missing from its "
                "manifest"
            )

    def fill(self, batch: list[Part]) -> None:
        """Read bytes of a file that follow each other into the tensors of the batch."""
        buffers, copies = receiving(batch)
        self.read_bytes(batch[0].file, batch[0].start, buffers)
        for out, into in copies:
            out.copy_(into)

    def fill_verified(self, chunk: Chunk, parts: list[Part]) -> str | None:
        """Read a chunk, its parts into their tensors; what is wrong with it."""
        buffers, copies = receiving(parts)
        digest, scratch = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        group: list[memoryview] = []
        start = position = chunk.start

        def read_group() -> None:
            self.read_bytes(chunk.file, start, group)
            for buffer in group:
                digest.update(buffer)

        os.posix_fadvise(self.files[chunk.file], start, chunk.size, os.POSIX_FADV_WILLNEED)
        try:
            for buffer, size in pieces_of(chunk, parts, buffers):
                if position + size - start > READ_BYTES or len(group) == BATCH_PARTS:
                    read_group()
                    group, start = [], position
                unwanted = scratch[position - start : position - start + size]
                group.append(unwanted if buffer is None else buffer)
                position += size
            read_group()
        except BadCheckpoint as error:
            return str(error).removeprefix(f"checkpoint {self.path}: ")
        wrong = mismatch(chunk, digest.hexdigest())
        if wrong is None:
            for out, into in copies:
                out.copy_(into)
        return wrong

    def read_bytes(self, file: str, start: int, into: list[memoryview]) -> None:
        while into:
            try:
                got = os.preadv(self.files[file], into, start)
            except OSError as error:
                raise BadCheckpoint(
                    f"checkpoint {self.path}: cannot read {file}: {error}; use another checkpoint"
                ) from error
            if not got:
                raise BadCheckpoint(
                    f"checkpoint {self.path}: {file} ends at byte {start}; use another checkpoint"
                )
            start += got
            while into and got >= len(into[0]):
                got -= len(into[0])
                into = into[1:]
            if got:
                into = [into[0][got:], *into[1:]]

    def ranks_key(self, kind: str, rank: int) -> Tensor | None:
        """A tensor that belongs to one rank (random generator states); None if it has none."""
        for piece in self.index.get((kind, str(rank)), ()):
            out = torch.empty(piece.elements, dtype=piece.dtype)
            self.read(kind, str(rank), piece.offset, out)
            return out
        return None

    def dtype_of(self, kind: str, name: str) -> torch.dtype:
        return self.index[kind, name][0].dtype
