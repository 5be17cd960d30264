"""Rows of results in one JSON-lines file a part, which several processes append to."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path


def path(out: Path, part: str) -> Path:
    return out / f"{part}.jsonl"


def append(out: Path, part: str, row: dict) -> None:
    """Add one row, whole or not at all as far as other writers can see."""
    with path(out, part).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def read(out: Path, part: str) -> list[dict]:
    """The newest row of every key, in the order of their first appearance."""
    if not path(out, part).exists():
        return []
    rows: dict[str, dict] = {}
    for line in path(out, part).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["key"]] = row
    return list(rows.values())
