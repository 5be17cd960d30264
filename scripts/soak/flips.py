"""Single bits flipped at many places of every file: each makes the checkpoint refused, by name."""

from __future__ import annotations

import logging
import random
import shutil
import time
from pathlib import Path

from soak.cells import SAVE_EVERY
from soak.damage import FILES, Base, step_name
from soak.kill import commit


class Said(logging.Handler):
    """Collects what the trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def key_of(base: Base, name: str, count: int, seed: int) -> str:
    return f"flips/{name}/{base.cell.key}/{count}/{seed}"


def run(base: Base, name: str, count: int, seed: int, folder: Path) -> dict:
    """Flip `count` random bits of one file, one at a time; ask the trainer which is the newest good
    checkpoint each time."""
    from llmtrain import checkpoint

    assert name in FILES
    began = time.monotonic()
    copy = folder / "run"
    shutil.copytree(base.run, copy)
    path = copy / "checkpoints" / step_name(base.newest) / name
    expected = step_name(base.newest - SAVE_EVERY)
    whole, draw = path.read_bytes(), random.Random(f"{seed}/flips/{name}")
    said, log = Said(), logging.getLogger("llmtrain")
    log.addHandler(said)
    accepted, unnamed, failed = [], [], []
    for _ in range(count):
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        content = bytearray(whole)
        content[at] ^= 1 << bit
        path.write_bytes(content)
        said.lines.clear()
        where = f"byte {at} bit {bit} ({whole[max(0, at - 12) : at + 4]!r})"
        try:
            found = checkpoint.newest_good(copy)
        except Exception as error:  # the row reports it
            failed.append(f"{where}: {error!r}")
            continue
        if found is None or found.name != expected:
            accepted.append(where)
        elif not any(name in line for line in said.lines):
            unnamed.append(f"{where}: {said.lines}")
    path.write_bytes(whole)
    log.removeHandler(said)
    problems = [
        f"{len(found)} of {count} flips {what}, the first: {found[:5]}"
        for what, found in (
            ("were not noticed", accepted),
            ("were refused without the file's name", unnamed),
            ("ended the start", failed),
        )
        if found
    ]
    return {
        "key": key_of(base, name, count, seed),
        "name": f"{count} flips in {name}",
        "file": name,
        "kind": "bits flipped one by one",
        "stage": base.cell.stage,
        "count": count,
        "refused": count - len(accepted) - len(failed),
        "commit": commit(),
        "problems": problems,
        "equal": not problems,
        "seconds": round(time.monotonic() - began, 1),
    }
