"""The manifest of a checkpoint: what belongs to it, and whether every byte of that is still there.

    format      2; format 1 (one sha256 a file, no kinds, no sha256 of itself) is read too
    parameters  name -> shape, buffers too          kinds  name -> what is stored of it
    files       name -> size, and the sha256 of each chunk of chunk_bytes
    sha256      of all of this, so that an edited manifest is noticed

Chunks are hashed on their own, by threads while a file is written, and by ranks when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import llmtrain

FORMAT = 2
READABLE = (1, 2)
CHUNK_BYTES = 64 * 2**20
STEP_NAME = re.compile(r"step-(\d{8,})")
READ_BYTES = 2**20
THREADS = 8


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used: what is wrong with it, and where."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Bytes start .. start + size of a file, and their sha256."""

    file: str
    start: int
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """files: name -> {"size": bytes, "sha256": [hex of each chunk]}; kinds: None in format 1."""

    step: int
    world_size: int
    vocab_size: int
    code_version: str
    parameters: dict[str, list[int]]
    kinds: dict[str, list[str]] | None
    files: dict[str, dict]
    chunk_bytes: int
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps(content | {"sha256": digest_of(content)}, indent=1)

    def chunks(self) -> list[Chunk]:
        """Every byte of the checkpoint, in the order of its files."""
        return [chunk for name in sorted(self.files) for chunk in self.chunks_of(name)]

    def chunks_of(self, name: str) -> list[Chunk]:
        size, digests = self.files[name]["size"], self.files[name]["sha256"]
        length = size if self.format == 1 else self.chunk_bytes
        starts = [i * length for i in range(len(digests))]
        return [
            Chunk(file=name, start=start, size=min(length, size - start), sha256=digest)
            for start, digest in zip(starts, digests)
        ]

    @property
    def rank_files(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry["size"] for entry in self.files.values())


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def digest_of(content: dict) -> str:
    """The sha256 of a manifest's content, however it is laid out."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a checkpoint folder. BadCheckpoint when it is missing, damaged or newer."""
    path = Path(path)
    try:
        content = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        raise BadCheckpoint(
            f"checkpoint {path}: got no manifest.json, expected a checkpoint folder (step-...); "
            "give a run folder or one of the folders in its checkpoints/"
        ) from error
    except (ValueError, OSError) as error:
        raise BadCheckpoint(
            f"checkpoint {path}: manifest.json is damaged ({error}); use another checkpoint"
        ) from error
    manifest = parse(content if isinstance(content, dict) else {}, path)
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named.group(1)) != manifest.step:
        raise BadCheckpoint(
            f"checkpoint {path}: got the checkpoint of step {manifest.step} in this folder, "
            f"expected that of step {int(named.group(1))}; give the folder its own name back"
        )
    return manifest


def parse(content: dict, path: Path) -> Manifest:
    version = content.get("format")
    if isinstance(version, int) and version not in READABLE:
        raise BadCheckpoint(
            f"checkpoint {path}: got format {version} (written by llmtrain "
            f"{content.get('code_version', '?')}), expected format {READABLE[0]} or "
            f"{READABLE[-1]}, which llmtrain {llmtrain.__version__} reads; read it with the "
            "version that wrote it, or a newer one"
        )
    digest = content.pop("sha256", None)
    if version == 1:
        content |= {"kinds": None, "chunk_bytes": CHUNK_BYTES}
    elif digest != digest_of(content):
        raise BadCheckpoint(
            f"checkpoint {path}: manifest.json is damaged: its content is not what its sha256 was "
            "taken of; use another checkpoint"
        )
    names = {entry.name for entry in fields(Manifest)}
    if content.keys() != names:
        raise BadCheckpoint(
            f"checkpoint {path}: manifest.json is damaged: got the keys "
            f"{', '.join(sorted(content))}, expected {', '.join(sorted(names))}; use another "
            "checkpoint"
        )
    if version == 1:
        content["files"] = {
            name: {**entry, "sha256": [entry["sha256"]]} for name, entry in content["files"].items()
        }
    return Manifest(**content)


def hash_file(path: Path) -> dict:
    """The entry of a finished file in a manifest: its size and its chunks' sha256."""
    size = path.stat().st_size
    count = max(1, -(-size // CHUNK_BYTES))
    return {
        "size": size,
        "sha256": [hash_range(path, i * CHUNK_BYTES, CHUNK_BYTES) for i in range(count)],
    }


def hash_range(path: Path, start: int, size: int) -> str:
    """sha256 of a file's bytes from start on, at most `size` of them."""
    digest, left = hashlib.sha256(), size
    buffer = memoryview(bytearray(min(READ_BYTES, max(left, 1))))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        file.seek(start)
        while left and (got := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:got])
            left -= got
    return digest.hexdigest()


def incomplete(path: Path, manifest: Manifest) -> dict[str, str]:
    """File name -> what is wrong with it, as far as names and sizes tell."""
    found = {}
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            found[name] = f"file {name} is missing" if missing else f"cannot read {name}: {error}"
            continue
        if size != entry["size"]:
            found[name] = f"{name} is damaged: got {size} bytes, expected {entry['size']}"
    expected = {rank_file(rank) for rank in range(manifest.world_size)}
    there = {file.name for file in path.glob("rank-*.safetensors")}
    for name in sorted((there | set(manifest.rank_files)) - expected):
        found[name] = f"{name} does not belong to this checkpoint of {manifest.world_size} ranks"
    for name in sorted(expected - set(manifest.rank_files)):
        found[name] = f"{name} is not in manifest.json"
    return found


def share_of(
    manifest: Manifest, *, skip: Collection[str] = (), rank: int = 0, size: int = 1
) -> list[Chunk]:
    """The chunks that this rank of those who verify together is to read, but for files to skip.

    The share is contiguous: ranks that continue their own checkpoint read what they need anyway.
    """
    whole, position, share = manifest.size, 0, []
    for chunk in manifest.chunks():
        middle = position + chunk.size / 2
        if chunk.file not in skip and int(middle * size / max(whole, 1)) == rank:
            share.append(chunk)
        position += chunk.size
    return share


def mismatch(chunk: Chunk, digest: str) -> str | None:
    """What is wrong with a chunk whose bytes have this sha256."""
    if digest == chunk.sha256:
        return None
    return (
        f"{chunk.file} is damaged: got sha256 {digest[:12]}..., expected "
        f"{chunk.sha256[:12]}... in its bytes {chunk.start} to {chunk.start + chunk.size}"
    )


def firsts(share: list[Chunk], wrong: Iterable[str | None]) -> dict[str, str]:
    """File name -> the first of what is wrong with its chunks, in the order of bytes."""
    found: dict[str, str] = {}
    for chunk, text in zip(share, wrong):
        if text is not None:
            found.setdefault(chunk.file, text)
    return found


def damaged(path: Path, share: list[Chunk]) -> dict[str, str]:
    """File name -> what is wrong with its content; reads a share of all bytes."""

    def check(chunk: Chunk) -> str | None:
        try:
            return mismatch(chunk, hash_range(path / chunk.file, chunk.start, chunk.size))
        except OSError as error:
            return f"cannot read {chunk.file}: {error}"

    with ThreadPoolExecutor(THREADS) as pool:  # reading and hashing release the interpreter lock
        return firsts(share, pool.map(check, share))
