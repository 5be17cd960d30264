"""A run folder read from outside, without the trainer's own code: what is there, and is it good.

While a job runs only names and the ends of logs are looked at; after a kill every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"
UNFINISHED = f"{TEMPORARY}step-"
DOOMED = f"{TEMPORARY}old-"


def step_of(name: str) -> int | None:
    """The step of a finished checkpoint's folder name."""
    match = STEP.fullmatch(name)
    return int(match.group(1)) if match else None


def json_lines(path: Path) -> list[dict]:
    """The whole lines of a log; the last may have been cut off by a kill."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines[:-1] if line]
    if lines[-1]:
        try:
            found.append(json.loads(lines[-1]))
        except json.JSONDecodeError:
            return found
    return found


def last_lines(path: Path, size: int = 4096) -> list[dict]:
    """The whole lines among the last bytes of a log that another process appends to."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    whole = lines[:-1] if end <= size else lines[1:-1]
    return [json.loads(line) for line in whole]


def steps_only(lines: list[dict]) -> list[dict]:
    """Of a ledger's lines, those that are optimizer steps."""
    return [line for line in lines if "event" not in line]


def digests(content: bytes, chunk: int | None) -> str | list[str]:
    """sha256 of a file's content, or of each chunk of it."""
    if chunk is None:
        return hashlib.sha256(content).hexdigest()
    starts = range(0, max(1, len(content)), chunk)
    return [hashlib.sha256(content[at : at + chunk]).hexdigest() for at in starts]


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, by its own manifest; None: it is good."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {error!r}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        content = path.read_bytes()
        if len(content) != expected["size"]:
            return f"{name} has {len(content)} bytes of {expected['size']}"
        if digests(content, manifest.get("chunk_bytes")) != expected["sha256"]:
            return f"{name} has another hash"
    return None


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A temporary file or folder. changed: when a file was last made in it, ns: tells it from
    another one of the same name."""

    files: tuple[str, ...]
    changed: int


@dataclass(frozen=True, kw_only=True)
class State:
    """What a dead run left. good: steps; bad: step -> what is wrong; leftovers: by name; latest:
    the name in it."""

    good: frozenset[int]
    bad: dict[int, str]
    leftovers: dict[str, Leftover]
    latest: str | None
    ledger: list[dict]
    metrics: list[dict]
    starts: list[dict]

    @property
    def last(self) -> int:
        """The last step of the ledger."""
        return self.ledger[-1]["step"] if self.ledger else 0

    @property
    def latest_step(self) -> int | None:
        return None if self.latest is None else step_of(self.latest)


class Folder:
    """A run folder."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"

    def names(self) -> list[str]:
        """What lies in checkpoints/."""
        try:
            return [entry.name for entry in self.checkpoints.iterdir()]
        except FileNotFoundError:
            return []

    def unfinished(self) -> dict[str, Leftover]:
        """Checkpoints being written, or left unfinished."""
        return {name: left for name, left in self.leftovers().items() if UNFINISHED in name}

    def leftovers(self) -> dict[str, Leftover]:
        found = {}
        for name in self.names():
            if name.startswith(TEMPORARY):
                path = self.checkpoints / name
                try:
                    changed = path.stat().st_mtime_ns
                    files = tuple(sorted(os.listdir(path))) if path.is_dir() else ()
                except FileNotFoundError:  # renamed or deleted meanwhile
                    continue
                found[name] = Leftover(files=files, changed=changed)
        return found

    def finished(self) -> set[int]:
        return {step for name in self.names() if (step := step_of(name)) is not None}

    def latest(self) -> str | None:
        """None when it is missing, or damaged on purpose beyond reading."""
        try:
            return (self.checkpoints / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def logged_step(self) -> int:
        """The last step in the ledger."""
        return max((line["step"] for line in last_lines(self.path / "ledger.jsonl")), default=0)

    def validated_step(self) -> int:
        """The last step in the metrics that was validated."""
        lines = json_lines(self.path / "metrics.jsonl")
        return max((line["step"] for line in lines if line.get("kind") == "val"), default=0)

    def size(self, name: str) -> int:
        """Bytes of a file; 0 without it."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return 0

    def state(self) -> State:
        """Everything, checked byte by byte."""
        bad, good = {}, set()
        for name in self.names():
            step = step_of(name)
            if step is not None:
                damage = damage_of(self.checkpoints / name)
                if damage is None:
                    good.add(step)
                else:
                    bad[step] = damage
        return State(
            good=frozenset(good),
            bad=bad,
            leftovers=self.leftovers(),
            latest=self.latest(),
            ledger=steps_only(json_lines(self.path / "ledger.jsonl")),
            metrics=json_lines(self.path / "metrics.jsonl"),
            starts=json_lines(self.path / "starts.jsonl"),
        )


def reading_checkpoint(pids: list[int], folder: Path) -> bool:
    """Whether one of the processes has a checkpoint's tensors open."""
    wanted = str(folder / "checkpoints")
    for pid in pids:
        try:
            opened = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except (FileNotFoundError, ProcessLookupError):  # ended, or closed a file meanwhile
            continue
        if any(name.startswith(wanted) and ".safetensors" in name for name in opened):
            return True
    return False
