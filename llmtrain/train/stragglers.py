"""Ranks that hold the others up are named.

Each rank measures a step's own work without waiting for others, and its wait for data;
medians over an interval are gathered, and a rank stands out when its median is above
health.straggler_factor times the median rank's, by more than FLOOR seconds and by more than SCORE
robust deviations of the ranks. Own work is, where no collective interrupts it,

    stages 0 and 1    from the data's arrival to the end of the last backward pass
    stage 2, overlap  ... to the end of the first forward pass: later on gradients are summed
    stage 3           not measured: weights are gathered in every pass, which makes ranks alike

On a GPU it lies between two events of the stream, read when the device has long passed them.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.distributed import World
from llmtrain.train.processes import Identity
from llmtrain.train.zero import Zero0

FLOOR = 0.05  # seconds a step by which a straggler is slower, at least
SCORE = 4.0
LEAST_STEPS = 4  # of an interval


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that began, or ceased, to stand out. cause: compute | data; factor: how much longer
    its steps take; seconds, median_seconds: a step, of this rank and of the median rank."""

    rank: int
    host: str
    slow: bool
    cause: str
    factor: float
    seconds: float
    median_seconds: float

    def __str__(self) -> str:
        work = "computes" if self.cause == "compute" else "waits for data"
        if not self.slow:
            return f"rank {self.rank} (host {self.host}) {work} as fast as the others again"
        return (
            f"rank {self.rank} (host {self.host}) {work} {self.seconds:.3f} s a step, the median "
            f"rank {self.median_seconds:.3f} s: it makes all steps {self.factor:.2f} times as long"
        )

    as_dict = asdict


def stand_out(values: Sequence[float], factor: float, *, beside: float = 0.0) -> dict[int, float]:
    """Index -> factor of the values that stand out above their median.

    beside: seconds that every step takes anyway. Of an even number the lower median counts, so
    that of two ranks the slower one can stand out.
    """
    median = statistics.median_low(values)
    deviation = statistics.median_low([abs(value - median) for value in values])
    base = max(beside + median, 1e-9)
    found = {}
    for i, value in enumerate(values):
        excess = value - median
        times = (base + excess) / base
        if excess > FLOOR and times > factor and excess > SCORE * 1.4826 * deviation:
            found[i] = times
    return found


def own_work_ends(zero: Zero0) -> str | None:
    """The lap that ends a rank's own work of a step at a ZeRO stage."""
    if zero.stage == 3:
        return None
    overlaps = zero.section().get("overlap_comm", False)
    return "forward" if zero.stage == 2 or overlaps else "backward"


class StepClock:
    """Times of a rank's own work, from begin() to the lap that ends it.

    ends: the lap, forward or backward; None: nothing is measured.
    """

    def __init__(self, device: torch.device, ends: str | None):
        self.device, self.ends = device, ends
        self.taken: deque[tuple[int, object, object]] = deque()
        self.began: object = None

    def begin(self, step: int) -> None:
        self.step, self.began = step, self.now()

    def lap(self, name: str) -> None:
        if name == self.ends and self.began is not None:
            self.taken.append((self.step, self.began, self.now()))
            self.began = None

    def now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, until: int) -> list[float]:
        """Of the steps up to that one, which the device must have done; they are forgotten."""
        found = []
        while self.taken and self.taken[0][0] <= until:
            _, began, ended = self.taken.popleft()
            if self.device.type == "cuda":
                found.append(began.elapsed_time(ended) / 1000)
            else:
                found.append(ended - began)
        return found


class Stragglers:
    """Finds ranks that hold the others up. factor: None looks for none."""

    def __init__(
        self,
        world: World,
        ranks: Sequence[Identity],
        device: torch.device,
        *,
        factor: float | None,
        ends: str | None,
    ):
        self.world, self.ranks, self.device = world, ranks, device
        self.factor = factor if world.size > 1 else None
        self.clock = StepClock(device, ends if self.factor else None)
        self.waits: deque[tuple[int, float]] = deque()
        self.slow: dict[str, set[int]] = {"compute": set(), "data": set()}
        self.compute: list[float] = []
        self.data: list[float] = []
        self.first_step: int | None = None
        self.coming: Tensor | None = None

    def begin(self, step: int, waited: float) -> None:
        """The step's data is there, after so many seconds."""
        if self.factor is None:
            return
        if self.first_step is None:  # it compiles
            self.first_step = step
            return
        self.waits.append((step, waited))
        self.clock.begin(step)

    def interval(self, step: int) -> list[Straggler]:
        """Take note of the steps up to that one; what changed. All ranks call it together."""
        if self.factor is None:
            return []
        self.compute += self.clock.seconds(step)
        while self.waits and self.waits[0][0] <= step:
            self.data.append(self.waits.popleft()[1])
        if len(self.data) < LEAST_STEPS:
            return []
        medians = [statistics.median(self.compute) if self.compute else 0.0]
        medians.append(statistics.median(self.data))
        self.compute, self.data = [], []
        own = torch.tensor(medians, dtype=torch.float64).to(self.device, non_blocking=True)
        rows = own.new_empty(self.world.size * len(own))
        dist.all_gather_into_tensor(rows, own)
        # Of a GPU the interval before is read, whose gathering is long done: nobody waits.
        rows, self.coming = (self.coming, rows) if rows.is_cuda else (rows, None)
        return [] if rows is None else self.judge(rows.view(-1, 2).tolist())

    def judge(self, rows: list[list[float]]) -> list[Straggler]:
        """rows: each rank's median seconds of own work and of waiting for data."""
        compute, data = ([row[i] for row in rows] for i in (0, 1))
        usual = statistics.median_low(compute)
        found = {
            "compute": stand_out(compute, self.factor),
            "data": stand_out(data, self.factor, beside=usual),
        }
        changes = []
        for cause, values in (("compute", compute), ("data", data)):
            for rank in sorted(self.slow[cause] ^ found[cause].keys()):
                changes.append(
                    Straggler(
                        rank=rank,
                        host=self.ranks[rank].host,
                        slow=rank in found[cause],
                        cause=cause,
                        factor=found[cause].get(rank, 1.0),
                        seconds=values[rank],
                        median_seconds=statistics.median_low(values),
                    )
                )
            self.slow[cause] = set(found[cause])
        return changes
