"""Learning rate schedules: pure functions of the step, so that a resume needs no state.

A schedule gives the ratio to the optimizer's lr of step s = 0 .. total_steps - 1:
linear warmup (s + 1) / warmup, then the schedule's own shape down to min_ratio.
Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983. Warmup-stable-decay: Hu et al. 2024,
arXiv:2404.06395; its "sqrt" shape: Haegele et al. 2024, arXiv:2405.18392, equation 3.
"""

from __future__ import annotations

import math


class Schedule:
    """Linear warmup; subclasses say what follows.

    warmup_fraction: share of total_steps; warmup_steps: a number of steps. Exactly one is given.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        warmup_fraction: float | None,
        warmup_steps: int | None,
        min_ratio: float,
    ):
        if (warmup_fraction is None) == (warmup_steps is None):
            raise ValueError(
                f"warmup_fraction={warmup_fraction}, warmup_steps={warmup_steps}: expected exactly "
                "one of the two; set the other to null"
            )
        if not 0.0 <= min_ratio <= 1.0:
            raise ValueError(f"min_ratio: got {min_ratio}, expected 0 .. 1; fix schedule.min_ratio")
        if warmup_steps is None:
            warmup_steps = round(warmup_fraction * total_steps)
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup: got {warmup_steps} steps, expected 0 .. {total_steps} (the steps of the "
                "run); lower schedule.warmup_steps or raise train.total_tokens"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio

    def ratio(self, step: int) -> float:
        """lr of this step / optimizer.lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.min_ratio + (1.0 - self.min_ratio) * self.shape(min(step, self.total_steps - 1))

    def shape(self, step: int) -> float:
        """1 at the end of the warmup, towards 0 at the end of the run."""
        raise NotImplementedError


class Cosine(Schedule):
    """Half a cosine from the end of the warmup to the end of the run."""

    def shape(self, step: int) -> float:
        x = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * x))


class WarmupStableDecay(Schedule):
    """Constant after the warmup, then a decay over the last decay_fraction of the run.

    decay_shape: linear, sqrt (1 - sqrt(x)) or cosine.
    """

    SHAPES = {
        "linear": lambda x: 1.0 - x,
        "sqrt": lambda x: 1.0 - math.sqrt(x),
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }

    def __init__(
        self,
        *,
        total_steps: int,
        warmup_fraction: float | None,
        warmup_steps: int | None,
        min_ratio: float,
        decay_fraction: float,
        decay_shape: str,
    ):
        super().__init__(
            total_steps=total_steps,
            warmup_fraction=warmup_fraction,
            warmup_steps=warmup_steps,
            min_ratio=min_ratio,
        )
        if decay_shape not in self.SHAPES:
            raise ValueError(
                f"decay_shape: got {decay_shape!r}, expected one of {', '.join(self.SHAPES)}; "
                "fix schedule.decay_shape"
            )
        self.decay = self.SHAPES[decay_shape]
        self.decay_steps = round(decay_fraction * total_steps)
        room = total_steps - self.warmup_steps
        if not 0 <= self.decay_steps <= room:
            raise ValueError(
                f"decay_fraction={decay_fraction}: got {self.decay_steps} steps of decay, expected "
                f"0 .. {room} (what the warmup leaves); lower schedule.decay_fraction"
            )

    def shape(self, step: int) -> float:
        start = self.total_steps - self.decay_steps
        return 1.0 if step < start else self.decay((step - start) / self.decay_steps)
