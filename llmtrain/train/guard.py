"""What is done about steps that go wrong: skip them, go back to a checkpoint, end the run.

A step is skipped, on all ranks alike and with no trace in weights or optimizer, when its loss or
gradient is not finite, or far above what the latest steps had:

    limit = median + factor * 1.4826 * max(MAD, floor)      over a window of applied steps

MAD: the median of |value - median|; 1.4826 MAD is the standard deviation of normal noise. The
floor keeps a flat curve's every wiggle from being far out. The limits of step s come from the
results of steps up to s - LAG, which the host has read without waiting for a GPU; so they are the
same on every device, and after a resume (state() stands in every checkpoint).

Several skips in a short time are no accident: the run goes back to a checkpoint from before the
first of them and passes over the data of the whole stretch (rollback.py).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmtrain.exits import RunFailed

LAG = 2
# Floors of the MAD, of the median; a loss's is at least as many nats, too.
LOSS_FLOOR, NORM_FLOOR = 0.02, 0.05
# What a step came to: 0 applied, else why it was skipped.
APPLIED, LOSS_NOT_FINITE, GRADIENT_NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = range(5)


class Limits(NamedTuple):
    """A step whose loss (nats per token) or gradient norm is above is skipped."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = Limits()


class Entry(NamedTuple):
    """An applied step."""

    step: int
    loss: float
    grad_norm: float


class Skip(NamedTuple):
    """A skipped step and why."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """The section guard of configs/train.yaml, which explains them. ValueError for bad ones."""

    window: int
    warmup_steps: int
    loss_spike: float | None
    norm_spike: float | None
    max_skipped: int
    rollback_after: int | None
    rollback_window: int
    max_rollbacks: int

    def __post_init__(self) -> None:
        least = {
            "window": 4,
            "warmup_steps": 0,
            "max_skipped": 1,
            "rollback_after": 1,
            "rollback_window": self.rollback_after or 1,
            "max_rollbacks": 1,
        }
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(
                    f"guard.{name}: got {given}, expected at least {value}; set "
                    f"guard.{name}={value} or more"
                )
        for name in ("loss_spike", "norm_spike"):
            given = getattr(self, name)
            if given is not None and given <= 0:
                raise ValueError(
                    f"guard.{name}: got {given}, expected more than 0, or null for no limit; set "
                    f"guard.{name}=null"
                )


def limit(values: list[float], factor: float, floor: float, least: float = 0.0) -> float:
    """The largest value that is no spike after these. floor: of the MAD, of the median; least: of
    the MAD."""
    median = float(np.median(values))
    spread = float(np.median(np.abs(np.array(values) - median)))
    return median + factor * 1.4826 * max(spread, floor * abs(median), least)


class Guard:
    """Sees the result of every step, in order, and says what it means. The same on all ranks."""

    def __init__(self, knobs: Knobs):
        self.knobs = knobs
        self.load(None)

    def limits(self, step: int) -> Limits:
        """Those of a step that is about to be made, from the results of steps up to step - LAG."""
        known = [entry for entry in self.window if entry.step <= step - LAG]
        applied = self.applied - (len(self.window) - len(known))
        if len(known) < self.knobs.window or applied < self.knobs.warmup_steps:
            return NO_LIMITS
        known = known[-self.knobs.window :]
        limits = {}
        if self.knobs.loss_spike is not None:
            limits["loss"] = limit(
                [entry.loss for entry in known], self.knobs.loss_spike, LOSS_FLOOR, LOSS_FLOOR
            )
        if self.knobs.norm_spike is not None:
            limits["grad_norm"] = limit(
                [entry.grad_norm for entry in known], self.knobs.norm_spike, NORM_FLOOR
            )
        return Limits(**limits)

    def saw(
        self, step: int, code: int, loss: float, grad_norm: float, limits: Limits
    ) -> str | None:
        """Take note of a step's result; why it was skipped, or None. limits: those it had."""
        while self.recent and self.recent[0].step <= step - self.knobs.rollback_window:
            self.recent.popleft()
        if code == APPLIED:
            self.in_a_row = 0
            self.applied += 1
            self.window.append(Entry(step, loss, grad_norm))
            return None
        reason = {
            LOSS_NOT_FINITE: "loss not finite",
            GRADIENT_NOT_FINITE: "gradient not finite",
            LOSS_SPIKE: f"loss spike: {loss:.6g} > {limits.loss:.6g}",
            NORM_SPIKE: f"norm spike: {grad_norm:.6g} > {limits.grad_norm:.6g}",
        }[code]
        self.skipped += 1
        self.in_a_row += 1
        self.recent.append(Skip(step, reason))
        return reason

    @property
    def stretch(self) -> list[Skip]:
        """The skipped steps that a rollback shall undo; empty: no need."""
        after = self.knobs.rollback_after
        return [] if after is None or len(self.recent) < after else list(self.recent)

    @property
    def suspect(self) -> int | None:
        """The first step that a rollback could still have to undo."""
        if self.knobs.rollback_after is None or not self.recent:
            return None
        return self.recent[0].step

    def check(self, step: int) -> None:
        """RunFailed when too many steps up to this one were skipped in a row."""
        if self.in_a_row >= self.knobs.max_skipped and not self.stretch:
            raise RunFailed(
                f"training: the last {self.in_a_row} steps (up to step {step}) were skipped"
                f"; the last one: {self.recent[-1].reason}; expected fewer than "
                f"guard.max_skipped={self.knobs.max_skipped}. Weights are as after step "
                f"{step - self.in_a_row}. ledger.jsonl has every step; lower optimizer.lr or "
                "train.grad_clip, raise guard.loss_spike if the losses there look sound, or look "
                "at the data of the samples named there, and continue from a checkpoint with "
                "train.resume=<folder>"
            )

    def metrics(self, limits: Limits) -> dict[str, float]:
        """What the log shows at an interval; limits: those of its last step."""
        values = {"guard/skipped": self.skipped}
        shown = {"guard/loss_limit": limits.loss, "guard/norm_limit": limits.grad_norm}
        return values | {name: value for name, value in shown.items() if math.isfinite(value)}

    def state(self) -> dict:
        """What a checkpoint keeps, for JSON."""
        return {
            "applied": self.applied,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "window": [list(entry) for entry in self.window],
            "recent": [list(skip) for skip in self.recent],
        }

    def load(self, state: dict | None) -> None:
        """Continue from a state; of another window, what fits. None: as before the first step."""
        state = state or {"applied": 0, "skipped": 0, "in_a_row": 0, "window": [], "recent": []}
        self.applied, self.skipped = state["applied"], state["skipped"]
        self.in_a_row = state["in_a_row"]
        entries = (Entry(*entry) for entry in state["window"])
        self.window: deque[Entry] = deque(entries, maxlen=self.knobs.window + LAG)
        # Of the last rollback_window steps.
        self.recent: deque[Skip] = deque(Skip(*skip) for skip in state["recent"])
