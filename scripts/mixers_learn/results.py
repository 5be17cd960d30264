"""Result rows in one JSON-lines file that several processes append to."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

FILE = "results.jsonl"


def append(folder: Path, row: dict) -> None:
    """Add one row, whole or not at all as far as other writers can see."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def read(folder: Path) -> list[dict]:
    """The newest row of every key, in the order of their first appearance."""
    path = folder / FILE
    if not path.exists():
        return []
    rows: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["key"]] = row
    return list(rows.values())


def finished(folder: Path) -> set[str]:
    """Keys of rows that need not be made again."""
    return {row["key"] for row in read(folder) if row["finished"]}
