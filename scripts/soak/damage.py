"""Checkpoints that are damaged: the file is named, the checkpoint refused, the one before used.

A base run is killed between its last saves, so that it has three checkpoints and steps to go. A
case breaks something in a copy of its folder, starts the same command again, and looks at what the
start said, where it continued, and whether its end equals the undisturbed twin's.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soak import checks
from soak.breakage import KINDS, exchange, overwrite_folder
from soak.cells import SAVE_EVERY, Cell
from soak.folder import Folder
from soak.kill import Bench, Unexpected, commit, finish, launch, watch_undisturbed

KEPT = 3
MANIFEST = "manifest.json"
FILES = (
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    MANIFEST,
    "trainer.json",
    "config.yaml",
    "tokenizer.json",
    "token_bytes.npy",
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A run with checkpoints to damage. steps: of the finished run."""

    cell: Cell
    folder: Path
    newest: int

    @property
    def steps(self) -> int:
        return self.cell.steps

    @property
    def run(self) -> Path:
        return self.folder / "base"

    @property
    def twin(self) -> Path:
        return self.folder / "twin"


@dataclass(frozen=True, kw_only=True)
class Case:
    """break_it(checkpoints folder, newest step) damages; used: the step that must be continued
    from, None: none is good, and the start must say so; named: what the start must name."""

    name: str
    file: str
    kind: str
    break_it: Callable[[Path, int], None]
    used: int | None
    named: str | None


def base_cell(stage: int, optimizer: str, device: str) -> Cell:
    return Cell(
        mixer="attention",
        stage=stage,
        ranks=2,
        micro_steps=1,
        validation=True,
        save="sync",
        channel="moe",
        stack="decoder",
        objective="causal",
        optimizer=optimizer,
        kills=2,
        device=device,
    )


def overrides(cell: Cell) -> list[str]:
    return [*cell.overrides(), *cell.saving(), f"train.keep={KEPT}"]


def make_base(cell: Cell, bench: Bench, folder: Path) -> Base:
    """The twin, and a run that was killed on all ranks when it had three checkpoints."""
    newest = (cell.steps // SAVE_EVERY - 1) * SAVE_EVERY
    base = Base(cell=cell, folder=folder, newest=newest)
    watch_undisturbed(cell, overrides(cell), bench, base.twin)
    job = launch(cell, overrides(cell), bench, base.run, "base")
    run, expected = Folder(base.run), {newest - i * SAVE_EVERY for i in range(KEPT)}
    while run.latest() != step_name(newest) or run.finished() != expected:
        if not job.running():
            raise Unexpected(f"the base run ended before step {newest}\n{job.tail()}")
        time.sleep(0.001)
    job.kill(list(range(cell.ranks)))
    job.wait()
    state = run.state()
    if state.good != expected:
        raise Unexpected(f"the base run has {sorted(state.good)}, expected {sorted(expected)}")
    return base


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def cases(newest: int, seed: int) -> list[Case]:
    """Every class of file, every way to break it, and whole folders and `latest`."""
    before = newest - SAVE_EVERY
    found = [broken_file(name, kind, before, seed) for name in FILES for kind in KINDS]
    found += [
        Case(
            name="rank files swapped",
            file="rank-*.safetensors",
            kind="swapped between ranks",
            break_it=lambda at, step: exchange(*(at / step_name(step) / n for n in FILES[:2])),
            used=before,
            named="rank-0000",
        )
    ]
    for name in (*FILES[:2], MANIFEST, "trainer.json"):  # the others are the same at every step
        found.append(
            Case(
                name=f"{name} of another step",
                file=name,
                kind="swapped between steps",
                break_it=lambda at, step, n=name: exchange(
                    *(at / step_name(s) / n for s in (step, before))
                ),
                used=before - SAVE_EVERY,  # both are damaged
                named=step_name(newest) if name == MANIFEST else name,
            )
        )
    return found + whole_folders(newest) + pointers(newest, seed)


def broken_file(name: str, kind: str, used: int, seed: int) -> Case:
    draw = random.Random(f"{seed}/{name}/{kind}")
    return Case(
        name=f"{name} {kind}",
        file=name,
        kind=kind,
        break_it=lambda at, step: KINDS[kind](at / step_name(step) / name, draw),
        used=used,
        named=name,
    )


def whole_folders(newest: int) -> list[Case]:
    before = newest - SAVE_EVERY

    def all_broken(at: Path, step: int) -> None:
        for i in range(KEPT):
            (at / step_name(step - i * SAVE_EVERY) / "trainer.json").unlink()

    def emptied(at: Path, step: int) -> None:
        shutil.rmtree(at / step_name(step))
        (at / step_name(step)).mkdir()

    def a_file(at: Path, step: int) -> None:
        shutil.rmtree(at / step_name(step))
        (at / step_name(step)).write_text("not a folder")

    def another(at: Path, step: int) -> None:
        overwrite_folder(at / step_name(step), at / step_name(before))

    def two_broken(at: Path, step: int) -> None:
        (at / step_name(step) / FILES[0]).write_bytes(b"")
        (at / step_name(before) / FILES[1]).unlink()

    folder = "the folder"

    def gone(at: Path, step: int) -> None:
        shutil.rmtree(at / step_name(step))

    plan = [
        ("two newest damaged", "two damaged", two_broken, before - SAVE_EVERY, FILES[1]),
        ("every checkpoint damaged", "all damaged", all_broken, None, "trainer.json"),
        ("folder emptied", "emptied", emptied, before, MANIFEST),
        ("folder gone", "deleted", gone, before, None),
        ("folder is a file", "a file", a_file, before, step_name(newest)),
        ("folder of another step", "swapped between steps", another, before, step_name(newest)),
    ]
    return [
        Case(name=name, file=folder, kind=kind, break_it=break_it, used=used, named=named)
        for name, kind, break_it, used, named in plan
    ]


def pointers(newest: int, seed: int) -> list[Case]:
    """`latest` is a hint: whatever it says, the newest good checkpoint is used."""
    found = []
    for kind in KINDS:
        draw = random.Random(f"{seed}/latest/{kind}")
        found.append(
            Case(
                name=f"latest {kind}",
                file="latest",
                kind=kind,
                break_it=lambda at, step, k=kind, d=draw: KINDS[k](at / "latest", d),
                used=newest,
                named=None,
            )
        )
    old = step_name(newest - SAVE_EVERY)
    found.append(
        Case(
            name="latest of another step",
            file="latest",
            kind="swapped between steps",
            break_it=lambda at, step: (at / "latest").write_text(f"{old}\n"),
            used=newest,
            named=None,
        )
    )
    return found


def key_of(case: Case, cell: Cell, seed: int) -> str:
    text = f"{case.name}/{cell.key}/{seed}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_case(case: Case, base: Base, bench: Bench, folder: Path) -> dict:
    """Break, start again, compare; the row of the results."""
    began = time.monotonic()
    run = folder / "run"
    shutil.copytree(base.run, run)
    case.break_it(run / "checkpoints", base.newest)
    starts = len(Folder(run).state().starts)
    job = launch(base.cell, overrides(base.cell), bench, run, "again")
    row = {"name": case.name, "file": case.file, "kind": case.kind, "stage": base.cell.stage}
    row |= {"commit": commit(), "key": key_of(case, base.cell, bench.seed), "used": None}
    problems = []
    try:
        finish(job)
        ended = True
    except Unexpected as error:
        ended, failure = False, str(error)
    said = job.logs[0].read_text(encoding="utf-8", errors="replace")
    lines = said.splitlines() if case.named else []
    row["said"] = next((line for line in lines if case.named in line), "")
    if case.named and not row["said"]:
        problems.append(f"the start did not name {case.named}")
    if case.used is None:
        row["refused"] = not ended and "resume=never" in said
        if not row["refused"]:
            problems.append("a start without a good checkpoint did not end with its reason")
    elif not ended:
        problems.append(failure)
    else:
        start = Folder(run).state().starts[starts:]
        row["used"] = start[0]["resumed_step"] if start else None
        row["refused"] = row["used"] == case.used
        if not row["refused"]:
            problems.append(f"continued from step {row['used']}, expected {case.used}")
        problems += checks.finished_differences(run, base.twin, base.steps)
    row |= {"problems": problems, "equal": not problems}
    return row | {"seconds": round(time.monotonic() - began, 1)}
