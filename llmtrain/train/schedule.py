"""Learning rate schedules: pure functions of the step, so that a resume needs no state.

A schedule gives the ratio to the optimizer's lr of step s = 0 .. total_steps - 1:
linear warmup (s + 1) / warmup, then the schedule's own shape, down to min_ratio where it decays.
Cosine: Loshchilov and Hutter 2017, arXiv:1608.03983. Warmup-stable-decay: Hu et al. 2024,
arXiv:2404.06395; its "sqrt" shape: Haegele et al. 2024, arXiv:2405.18392, equation 3.
"""

from __future__ import annotations

import logging
import math

log = logging.getLogger(__name__)


class Schedule:
    """Linear warmup; subclasses say what follows.

    warmup_fraction: share of total_steps; warmup_steps: a number of steps. Exactly one is given.
    """

    def __init__(
        self, *, total_steps: int, warmup_fraction: float | None, warmup_steps: int | None
    ):
        if (warmup_fraction is None) == (warmup_steps is None):
            raise ValueError(
                f"warmup_fraction={warmup_fraction}, warmup_steps={warmup_steps}: expected exactly "
                "one of the two; set the other to null"
            )
        if warmup_steps is None:
            warmup_steps = round(warmup_fraction * total_steps)
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup: got {warmup_steps} steps, expected 0 .. {total_steps} (the steps of the "
                "run); lower schedule.warmup_steps or raise train.total_tokens"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def ratio(self, step: int) -> float:
        """lr of this step / optimizer.lr."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(min(step, self.total_steps - 1))

    def after_warmup(self, step: int) -> float:
        raise NotImplementedError


class Constant(Schedule):
    """No decay: a stable run, from whose checkpoints decays branch off (WarmupStableDecay)."""

    def after_warmup(self, step: int) -> float:
        return 1.0


class Decay(Schedule):
    """min_ratio: at the end of the run."""

    def __init__(
        self,
        *,
        total_steps: int,
        warmup_fraction: float | None,
        warmup_steps: int | None,
        min_ratio: float,
    ):
        super().__init__(
            total_steps=total_steps, warmup_fraction=warmup_fraction, warmup_steps=warmup_steps
        )
        if not 0.0 <= min_ratio <= 1.0:
            raise ValueError(f"min_ratio: got {min_ratio}, expected 0 .. 1; fix schedule.min_ratio")
        self.min_ratio = min_ratio

    def after_warmup(self, step: int) -> float:
        return self.min_ratio + (1.0 - self.min_ratio) * self.shape(step)

    def shape(self, step: int) -> float:
        """1 at the end of the warmup, towards 0 at the end of the run."""
        raise NotImplementedError

    def progress(self, step: int) -> float:
        """0 at the end of the warmup, towards 1 at the end of the run."""
        return (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)


class Cosine(Decay):
    """Half a cosine from the end of the warmup to the end of the run."""

    def shape(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))


class Linear(Decay):
    """A straight line from the end of the warmup to the end of the run."""

    def shape(self, step: int) -> float:
        return 1.0 - self.progress(step)


class WarmupStableDecay(Decay):
    """Constant after the warmup, then a decay that ends with the run.

    decay_fraction: share of the run's steps that decay, decay_steps: a number of steps; neither:
    a fraction of 0.2. decay_from: step after which it begins, where the run's length follows from
    that (branch.py). decay_shape: linear, sqrt (1 - sqrt(x)) or cosine.
    """

    SHAPES = {
        "linear": lambda x: 1.0 - x,
        "sqrt": lambda x: 1.0 - math.sqrt(x),
        "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    }
    FRACTION = 0.2

    def __init__(
        self,
        *,
        total_steps: int,
        warmup_fraction: float | None,
        warmup_steps: int | None,
        min_ratio: float,
        decay_fraction: float | None,
        decay_steps: int | None,
        decay_from: int | str | None,
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
        if decay_fraction is not None and decay_steps is not None:
            raise ValueError(
                f"decay_fraction={decay_fraction}, decay_steps={decay_steps}: expected at most one "
                "of the two; set the other to null"
            )
        if decay_steps is None:
            fraction = self.FRACTION if decay_fraction is None else decay_fraction
            decay_steps = round(fraction * total_steps)
        self.decay = self.SHAPES[decay_shape]
        self.decay_steps = decay_steps
        room = total_steps - self.warmup_steps
        if not 0 <= decay_steps <= room:
            raise ValueError(
                f"decay: got {decay_steps} steps of decay, expected 0 .. {room} (what the warmup "
                "leaves); lower schedule.decay_fraction or schedule.decay_steps"
            )
        if decay_from is not None and decay_from != total_steps - decay_steps:
            raise ValueError(
                f"decay_from: got {decay_from}, but the last {decay_steps} of {total_steps} steps "
                f"begin after step {total_steps - decay_steps}; remove schedule.decay_from"
            )

    def shape(self, step: int) -> float:
        start = self.total_steps - self.decay_steps
        return 1.0 if step < start else self.decay((step - start) / self.decay_steps)


def announce_resume(schedule: Schedule, lr: float, trainer: dict) -> None:
    """Log the learning rates on both sides of a resume, and a warning when the schedule does not
    give the last step the rate that it had. trainer: the checkpoint's."""
    step, saved = trainer["step"], trainer.get("lr_ratio")
    following = f"{lr * schedule.ratio(step):.4e} at step {step + 1}"
    if saved is None:  # a checkpoint from before rates were noted, or of no step
        log.info("learning rate: %s, the next", following)
        return
    log.info("learning rate: %.4e at step %d, the checkpoint's; %s", lr * saved, step, following)
    ours = schedule.ratio(step - 1)
    if abs(ours - saved) > 1e-9:
        log.warning(
            "learning rate: the schedule is another than the checkpoint's: it gives step %d %.4e, "
            "which was trained with %.4e, so that the rate jumps here. If that is not meant, set "
            "schedule and train.total_tokens as they were",
            step,
            lr * ours,
            lr * saved,
        )
