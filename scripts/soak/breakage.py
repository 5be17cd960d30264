"""Ways to break a file, as disks, copies and people do."""

from __future__ import annotations

import random
import shutil
from pathlib import Path


def truncate(path: Path, draw: random.Random) -> None:
    """Cut off at a random byte."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(1, len(content))])


def flip(path: Path, draw: random.Random) -> None:
    """One bit, anywhere."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def zeros(path: Path, draw: random.Random) -> None:
    """As long as it was; what a file system may leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


def garbage(path: Path, draw: random.Random) -> None:
    """Random bytes, as many as it had."""
    path.write_bytes(draw.randbytes(path.stat().st_size))


def directory(path: Path, draw: random.Random) -> None:
    """A folder of that name with a file in it."""
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"x")


def longer(path: Path, draw: random.Random) -> None:
    """Bytes at its end."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 64)))


KINDS = {
    "truncated": truncate,
    "one bit flipped": flip,
    "deleted": delete,
    "emptied": empty,
    "zeros": zeros,
    "garbage": garbage,
    "longer": longer,
    "a directory": directory,
}


def exchange(one: Path, other: Path) -> None:
    """Swap two files or folders."""
    aside = one.with_name(f"{one.name}.aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def overwrite_folder(folder: Path, source: Path) -> None:
    """The whole content of another folder under this one's name."""
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
