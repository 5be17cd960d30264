"""Faults on purpose, for tests and drills: guard.inject, a list of texts.

    <kind>@<step>[-<last step>][:rank<N>][:x<factor>]

    nan_gradient@12      the gradient is NaN        loss_spike@20:x50    loss and gradient times 50
    nan_loss@12-14       loss and gradient are NaN  norm_spike@20:x100   the gradient times 100
    hang@30:rank1        rank 1 stops moving        slow@10-40:rank1:x3  takes 3 times as long
    flip_weight@25:rank1 a bit of its copy changes  kill@15:rank0        SIGKILL to itself

The upper four are faults of the data: step 12 names data step 11, what step 12 reads unless data
was passed over before. They act on all ranks, whenever that data is read; passed over with it,
they are gone. The lower four act at an optimizer step, before its forward pass (flip_weight: after
its update), and once: a rank notes each on the disk, in <run_dir>/faults, before it acts, and a
restarted run leaves out what is noted there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

TEXT = re.compile(r"(\w+)@(-?\d+)(?:-(\d+))?(?::rank(\d+))?(?::x(\d+(?:\.\d+)?))?")
EXAMPLES = {
    "nan_gradient": "nan_gradient@12",
    "nan_loss": "nan_loss@12",
    "loss_spike": "loss_spike@20:x50",
    "norm_spike": "norm_spike@20:x100",
    "hang": "hang@30:rank1",
    "slow": "slow@10-40:rank1:x3",
    "kill": "kill@15:rank0",
    "flip_weight": "flip_weight@25:rank1",
}
OF_DATA = ("nan_gradient", "nan_loss", "loss_spike", "norm_spike")
WITH_FACTOR = ("loss_spike", "norm_spike", "slow")
OVER_STEPS = (*OF_DATA, "slow")
FOLDER = "faults"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault at the steps first .. last (from 1). rank: None for those of the data."""

    text: str
    kind: str
    first: int
    last: int
    rank: int | None
    factor: float | None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """ValueError unless the text names a fault, and just what that kind takes."""
        match = TEXT.fullmatch(text)
        if match is None or match[1] not in EXAMPLES:
            raise ValueError(
                f"guard.inject: got {text!r}, expected a fault such as "
                f"{', '.join(EXAMPLES.values())}; remove it or write one like these"
            )
        kind, example = match[1], EXAMPLES[match[1]]
        first, last = int(match[2]), int(match[3] or match[2])
        given = {"rank": match[4], "factor": match[5]}
        wanted = {"rank": kind not in OF_DATA, "factor": kind in WITH_FACTOR}
        problems = [
            f"no {what}" if wanted[what] else f"a {what} that it does not take"
            for what, value in given.items()
            if wanted[what] == (value is None)
        ]
        if first < 1 or last < first:
            problems.append(f"the steps {first} .. {last}, which do not count up from 1")
        if last > first and kind not in OVER_STEPS:
            problems.append("several steps")
        if problems:
            raise ValueError(
                f"guard.inject: got {text!r}, with {' and '.join(problems)}; expected {kind} as in "
                f"{example!r}; write it so"
            )
        return cls(
            text=text,
            kind=kind,
            first=first,
            last=last,
            rank=None if match[4] is None else int(match[4]),
            factor=None if match[5] is None else float(match[5]),
        )


def check(
    texts: Sequence[str], *, ranks: int, steps: int, stage: int, run_dir: Path
) -> tuple[Fault, ...]:
    """The faults that a run of so many ranks and steps shall have. ValueError for impossible ones.

    What has acted already may name a rank that is there no more.
    """
    faults = tuple(Fault.parse(text) for text in texts)
    for fault in faults:
        if fault.first > steps:
            raise ValueError(
                f"guard.inject: {fault.text!r} has no effect, the run has {steps} steps; name an "
                "earlier step or remove it"
            )
        if fault.kind == "flip_weight" and stage == 3:
            raise ValueError(
                f"guard.inject: {fault.text!r} with deepspeed stage 3, where each weight has one "
                "copy only, expected stage 0, 1 or 2; set deepspeed=zero0 or remove it"
            )
        if fault.rank is not None and fault.rank >= ranks and fault.text not in acted(run_dir):
            raise ValueError(
                f"guard.inject: {fault.text!r} names rank {fault.rank}, expected one of 0 .. "
                f"{ranks - 1}; change it or start more ranks"
            )
    return faults


def acted(run_dir: Path) -> set[str]:
    """Texts of the faults that ranks noted before they acted."""
    lines = [
        line
        for path in sorted((run_dir / FOLDER).glob("rank-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return {json.loads(line)["fault"] for line in lines}


@dataclass(frozen=True, kw_only=True)
class Spoil:
    """Factors of a step's reported loss and of its gradient."""

    loss: float = 1.0
    gradient: float = 1.0


UNSPOILED = Spoil()


class Faults:
    """The faults of one run, on one rank."""

    def __init__(self, faults: Sequence[Fault], *, rank: int, run_dir: Path):
        self.rank, self.run_dir = rank, run_dir
        self.of_data = [fault for fault in faults if fault.rank is None]
        done = acted(run_dir)
        self.of_ranks = [f for f in faults if f.rank is not None and f.text not in done]
        self.slow: Fault | None = None
        self.began, self.slept = time.perf_counter(), 0.0

    def starting(self, step: int, data_step: int) -> list[str]:
        """Texts of the faults, of any rank, that act first at this step."""
        own = [fault.text for fault in self.of_ranks if fault.first == step]
        return own + [f.text for f in self.of_data if f.first <= data_step + 1 <= f.last]

    def spoil(self, data_step: int) -> Spoil:
        """What the faults of this data step (from 0) multiply."""
        loss = gradient = 1.0
        for fault in self.of_data:
            if fault.first <= data_step + 1 <= fault.last:
                factor = float("nan") if fault.factor is None else fault.factor
                gradient *= factor
                if fault.kind in ("nan_loss", "loss_spike"):
                    loss *= factor
        return Spoil(loss=loss, gradient=gradient) if self.of_data else UNSPOILED

    def before(self, step: int) -> None:
        """Act, if this rank shall, before the forward pass of an optimizer step (from 1)."""
        last_step = time.perf_counter() - self.began - self.slept
        self.began, self.slept = time.perf_counter(), 0.0
        for fault in self.of_ranks:
            if fault.rank != self.rank or not fault.first <= step <= fault.last:
                continue
            if fault.kind == "slow":
                self.sleep(fault, step, last_step)
            elif fault.kind == "kill":
                self.note(fault, step)
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "hang":
                self.note(fault, step)
                while True:
                    time.sleep(60)

    def sleep(self, fault: Fault, step: int, last_step: float) -> None:
        """Make this step last factor times as long as the one before took without sleep."""
        if self.slow is not fault:
            self.slow = fault
            self.note(fault, step)
        self.slept = max(0.0, (fault.factor - 1) * last_step)
        time.sleep(self.slept)

    def after(self, step: int, module: nn.Module) -> None:
        """Act, if this rank shall, after the update of an optimizer step."""
        for fault in self.of_ranks:
            if fault.kind == "flip_weight" and (fault.rank, fault.first) == (self.rank, step):
                self.note(fault, step)
                flip_bit(next(module.parameters()).data)

    def note(self, fault: Fault, step: int) -> None:
        """Write down, durably, that a fault acts now."""
        folder = self.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        with (folder / f"rank-{self.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"fault": fault.text, "step": step}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def flip_bit(weights: torch.Tensor) -> None:
    """Change one mantissa bit of the first element (float32): by a quarter at most."""
    weights.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 21)
