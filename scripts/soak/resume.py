"""Stopped and continued: on the same ranks bit for bit, on other ranks and stages to rounding.

A chain is a training in legs. Each leg but the last gets SIGTERM, on one of its ranks, once a
chosen step is in the ledger; it saves, ends, and the next leg continues with other ranks, another
micro-batch, perhaps another ZeRO stage. The twin is one start that nobody stops: on the same ranks
for a chain whose legs are all alike, else on one rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, dataclass, replace
from itertools import permutations, product
from pathlib import Path

import numpy as np

from llmtrain import groups
from soak import checks
from soak.cells import DECKS, MUON_STAGES, ROWS, SAVE_EVERY, STAGES, Cell, deal
from soak.folder import Folder, State, step_of
from soak.kill import LONGEST, Bench, Unexpected, commit, finish, launch

STOPPED = 85  # llmtrain's exit code of a training that was asked to stop
WORLDS = (1, 2, 3, 4)
# Of a loss or gradient norm, relative; of all weights together, the norm of the difference.
LOSS_NOISE, NORM_NOISE, WEIGHT_NOISE = 1e-6, 1e-5, 1e-4
# Channels whose loss is taken over a micro-batch by its nature: those keep theirs.
BALANCED = ("moe", "moe_balanced")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The legs of one training, each a cell; stops: the steps after which they are stopped."""

    legs: tuple[Cell, ...]
    stops: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether all legs are alike."""
        return len(set(self.legs)) == 1

    @property
    def name(self) -> str:
        if self.same:
            return f"same-{self.legs[0].name}"
        path = "-".join(f"{leg.ranks}r{leg.stage}" for leg in self.legs)
        return f"{path}-{self.legs[0].name}"

    @property
    def key(self) -> str:
        """Changes with whatever would change the runs, the code aside."""
        content = [asdict(self), [leg.overrides() for leg in self.legs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @property
    def twin(self) -> Cell:
        first = self.legs[0]
        return first if self.same else on_ranks(first, 1, first.stage, random.Random(0))


def on_ranks(cell: Cell, ranks: int, stage: int, draw: random.Random) -> Cell:
    """The same training there, in micro-batches of a size that fits."""
    rows = ROWS // ranks
    micro_steps = rows if cell.channel in BALANCED else draw.choice(divisors(rows))
    return replace(cell, ranks=ranks, stage=stage, micro_steps=micro_steps)


def divisors(number: int) -> list[int]:
    """Those that make two or three micro-batches."""
    return [d for d in (2, 3) if number % d == 0]


def dealt_cells(pairs: list[tuple[str, int]], seed: str) -> list[Cell]:
    """A cell for each (mixer, stage), the other axes dealt."""
    columns = {axis: deal(deck, len(pairs), f"{seed}/{axis}") for axis, deck in DECKS.items()}
    cells = []
    for i, (mixer, stage) in enumerate(pairs):
        dealt = {axis: column[i] for axis, column in columns.items()} | {"validation": True}
        if stage not in MUON_STAGES:
            dealt["optimizer"] = "adamw"
        cells.append(Cell(mixer=mixer, stage=stage, kills=1, **dealt))
    return cells


def same_chains(pairs: list[tuple[str, int]], seed: int) -> list[Chain]:
    """Stopped once and continued as they were, with more than one micro-batch a step."""
    draw, found = random.Random(f"{seed}/same"), []
    worlds = deal(WORLDS, len(pairs), f"{seed}/same/worlds")
    for cell, ranks in zip(dealt_cells(pairs, f"{seed}/same"), worlds):
        rows = ROWS // ranks
        leg = replace(cell, ranks=ranks, micro_steps=draw.choice(divisors(rows)))
        # Both the last two saves come after the stop, so that the twin keeps the same two.
        found.append(Chain(legs=(leg, leg), stops=(draw.randint(1, leg.steps - SAVE_EVERY - 3),)))
    return found


def changing_chains(pairs: list[tuple[str, int]], seed: int, *, mixed: bool) -> list[Chain]:
    """Through all worlds in a dealt order; mixed: through stages too."""
    orders = deal(tuple(permutations(WORLDS)), len(pairs), f"{seed}/orders")
    draw, found = random.Random(f"{seed}/changing/{mixed}"), []
    for cell, order in zip(dealt_cells(pairs, f"{seed}/changing/{mixed}"), orders):
        allowed = MUON_STAGES if cell.optimizer == "muon" else STAGES
        stages = deal(allowed, len(order), f"{seed}/{cell.name}")
        legs = tuple(
            on_ranks(cell, ranks, stage if mixed else cell.stage, draw)
            for ranks, stage in zip(order, stages)
        )
        quarter = cell.steps // len(legs)
        found.append(Chain(legs=legs, stops=tuple(quarter * i for i in range(1, len(legs)))))
    return found


def sample(seed: int) -> list[Chain]:
    """Every mixer once as it was, stages dealt; every stage through all worlds, and one through
    stages too."""
    mixers = random.Random(seed).sample(mixer_names(), len(mixer_names()))
    stages = deal(STAGES, len(mixers), f"{seed}/stages")
    changing = list(zip(mixers, STAGES))
    return [
        *same_chains(list(zip(mixers, stages)), seed),
        *changing_chains(changing, seed, mixed=False),
        *changing_chains([(mixers[len(STAGES)], 0)], seed, mixed=True),
    ]


def matrix(seed: int) -> list[Chain]:
    """Every mixer at every stage, as it was and through all worlds; and each through stages."""
    pairs = list(product(mixer_names(), STAGES))
    return [
        *same_chains(pairs, seed),
        *changing_chains(pairs, seed, mixed=False),
        *changing_chains([(mixer, 0) for mixer in mixer_names()], seed, mixed=True),
    ]


def mixer_names() -> list[str]:
    return list(groups.options()["mixer"])


def run_chain(chain: Chain, bench: Bench, folder: Path) -> dict:
    """The twin, the legs, and how they compare; the row of the results."""
    began = time.monotonic()
    row = {
        "key": chain.key,
        "name": chain.name,
        "legs": [asdict(leg) for leg in chain.legs],
        "stops": list(chain.stops),
        "commit": commit(),
        "start": bench.how,
    }
    problems: list[str] = []
    try:
        twin = chain.twin
        job = launch(twin, twin.overrides() + twin.saving("sync"), bench, folder / "twin", "twin")
        finish(job)
        for number, leg in enumerate(chain.legs):
            stop = chain.stops[number] if number < len(chain.stops) else None
            run_leg(leg, stop, number, bench, folder)
        run, other = folder / "run", folder / "twin"
        problems += resumed_where_stopped(Folder(run).state(), chain)
        if chain.same:
            problems += checks.finished_differences(run, other, chain.legs[0].steps)
        else:
            row["differences"], found = changed_differences(run, other, chain.legs[0].steps)
            problems += found
    except Unexpected as error:
        problems.append(str(error))
    row |= {
        "problems": problems,
        "equal": not problems,
        "seconds": round(time.monotonic() - began, 1),
    }
    return row


def run_leg(leg: Cell, stop: int | None, number: int, bench: Bench, folder: Path) -> None:
    """Start a leg; stop it after a step, or let it finish."""
    run = Folder(folder / "run")
    job = launch(leg, leg.overrides() + leg.saving(), bench, run.path, f"leg-{number}")
    if stop is None:
        finish(job)
        return
    while run.logged_step() < stop:
        if any(job.codes()) or None not in job.codes() or job.seconds() > LONGEST:
            job.outlive(5.0)
            raise Unexpected(f"leg {number} did not reach step {stop}: {job.codes()}\n{job.tail()}")
        time.sleep(0.002)
    os.kill(job.pids[-1], signal.SIGTERM)  # one rank's signal stops all
    while job.running() and job.seconds() < LONGEST:
        time.sleep(0.01)
    if set(job.codes()) != {STOPPED}:
        job.outlive(0.0)
        raise Unexpected(f"leg {number} ended with {job.codes()}, not {STOPPED}\n{job.tail()}")


def resumed_where_stopped(state: State, chain: Chain) -> list[str]:
    """Each leg but the first began at or after the stop before it, and before the end."""
    resumed = [start["resumed_step"] for start in state.starts]
    begins = [0, *chain.stops]
    right = len(resumed) == len(begins) and all(
        at >= begin and (at > 0) == (begin > 0) and at < chain.legs[0].steps
        for at, begin in zip(resumed, begins)
    )
    return [] if right else [f"legs began at {resumed}, expected at or after {begins}"]


def gap(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-30)


def changed_differences(run: Path, twin: Path, steps: int) -> tuple[dict[str, float], list[str]]:
    """(largest relative differences, problems) of a run whose ranks changed."""
    now, expected = Folder(run).state(), Folder(twin).state()
    problems = [f"step-{step:08d}: {damage}" for step, damage in now.bad.items()]
    counted = [line["step"] for line in now.ledger]
    if counted != list(range(1, steps + 1)):
        return {}, [*problems, f"ledger.jsonl: steps {counted}, expected 1 .. {steps} once each"]
    for name in ("samples", "tokens", "lr", "applied"):
        values = [[line.get(name) for line in state.ledger] for state in (now, expected)]
        if values[0] != values[1]:
            problems.append(f"ledger.jsonl: {name} {values[0]}, the twin has {values[1]}")
    pairs = list(zip(now.ledger, expected.ledger))
    validated = [
        [line for line in state.metrics if line.get("kind") == "val"] for state in (now, expected)
    ]
    if [line["step"] for line in validated[0]] != [line["step"] for line in validated[1]]:
        problems.append("metrics.jsonl: other steps were validated than the twin's")
    found = {
        "loss": max(gap(a["loss"], b["loss"]) for a, b in pairs),
        "grad_norm": max(gap(a["grad_norm"], b["grad_norm"]) for a, b in pairs),
        "val_loss": max(gap(a["loss"], b["loss"]) for a, b in zip(*validated)),
        "weights": weight_gap(run, twin, steps),
    }
    limits = {"loss": LOSS_NOISE, "grad_norm": NORM_NOISE, "val_loss": LOSS_NOISE}
    limits["weights"] = WEIGHT_NOISE
    problems += [
        f"{name} differs by {value:.1e}, expected at most {limits[name]:.0e}"
        for name, value in found.items()
        if not value <= limits[name]
    ]
    return found, problems


def weight_gap(run: Path, twin: Path, steps: int) -> float:
    """|w - w'| / |w'| over all parameters and buffers of the last checkpoints; nan: not alike."""
    one, other = (whole_tensors(path / "checkpoints", steps) for path in (run, twin))
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        return math.nan
    difference = sum(float(((one[k] - other[k]) ** 2).sum()) for k in one)
    return math.sqrt(difference / sum(float((value**2).sum()) for value in other.values()))


def whole_tensors(checkpoints: Path, step: int) -> dict[str, np.ndarray]:
    """Parameter -> its values in float64, put together from the fragments of all ranks."""
    (path,) = (path for path in checkpoints.iterdir() if step_of(path.name) == step)
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for key, value in checks.tensors_of(path).items():
        kind, name, offset = key.partition(": ")[2].split("|")
        if kind == "param":
            pieces.setdefault(name, []).append((int(offset), value.astype(np.float64)))
    return {
        name: np.concatenate([value for _, value in sorted(found, key=lambda piece: piece[0])])
        for name, found in pieces.items()
    }
