"""What steps came to: read from the device, seen by the guard, and written down."""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from llmtrain.train.engine import Pending
from llmtrain.train.guard import Guard, Limits
from llmtrain.train.meter import Meter
from llmtrain.train.runlog import RunLog
from llmtrain.train.stragglers import Stragglers

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """A step whose result the host has not read. lr: of its update; samples: [first, end)."""

    step: int
    lr: float
    limits: Limits
    samples: tuple[int, int]
    pending: Pending


class Results:
    """In the order of steps. behind: steps that are left unread while others are made, so as not to
    wait for a GPU; log_every, last_step: steps whose interval goes to the metrics."""

    def __init__(
        self,
        guard: Guard,
        meter: Meter,
        run_log: RunLog,
        stragglers: Stragglers,
        *,
        behind: int,
        log_every: int,
        last_step: int,
    ):
        self.guard, self.meter, self.log, self.stragglers = guard, meter, run_log, stragglers
        self.behind, self.log_every, self.last_step = behind, log_every, last_step
        self.unread: deque[Made] = deque()
        self.stopping = False

    def add(self, made: Made) -> None:
        """A step was made: read all but the last ones."""
        self.unread.append(made)
        self.read(behind=self.behind)

    def read(self, *, behind: int = 0) -> None:
        """Read all but the last `behind`; those after a step that sends the run back are dropped.

        RunFailed when the guard ends the run.
        """
        while len(self.unread) > behind:
            made = self.unread.popleft()
            self.note(made)
            if self.guard.stretch:
                self.unread.clear()
                return
            self.guard.check(made.step)
            if made.step % self.log_every == 0 or made.step == self.last_step:
                self.interval(made)

    def note(self, made: Made) -> None:
        """One step: the guard's opinion, and a line of the ledger."""
        result = made.pending.read()
        self.stopping |= result.stop
        reason = self.guard.saw(made.step, result.code, result.loss, result.grad_norm, made.limits)
        line = {
            "applied": result.applied,
            "reason": reason,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": made.lr,
            "tokens": result.tokens,
            "samples": list(made.samples),
        }
        self.log.step(made.step, line)
        if reason is not None:
            first, end = made.samples
            self.log.say(f"step {made.step} skipped: {reason}; samples {first} .. {end - 1}")
        self.meter.add(result)

    def interval(self, made: Made) -> None:
        """The means since the last interval, and ranks that were slow in it."""
        tokens = made.step * self.meter.step_tokens
        values = {"lr": made.lr, "tokens": tokens, **self.meter.take()}
        values |= self.guard.metrics(made.limits) | {"guard/rollbacks": self.log.course}
        self.log.interval(made.step, "train", values)
        for straggler in self.stragglers.interval(made.step):
            log.warning("step %d: %s", made.step, straggler)
            self.log.health(made.step, "straggler", straggler.as_dict(), straggler.factor)
