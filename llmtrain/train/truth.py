"""Whether the optimizer did what its configuration says, at the first applied step of every start.

The change really made to the weights is compared with a float64 reference computed from the
reduced gradients, the state before the step and the configuration: learning rate, decay, clipping
factor, step count. Nothing of the optimizer or of DeepSpeed is used for it, so an update that
either changed, left out or did twice is seen (tests/train/test_truth.py does these). A wrong
update ends the run.

What is compared is a sample of each group's tensors: largest, smallest, then the others from small
to large, of each at most a quarter of the group's share of `elements`; of matrices under Muon
whole ones. On a CPU a tenth of `elements`. Every rank looks at what it owns of them; sums are added
up over the ranks.

float32 cannot show a change below half a unit in the last place of a weight; that much is allowed.
Muon's orthogonalisation has the rounding of its dtype, which in 16 bits is large where gradients
have few directions. It is measured: the iteration is also run in that dtype, and its distance from
float64, times 3, is allowed. The size of the update and its part along the weights (the decay) are
therefore checked by themselves; there such noise averages out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.distributed import World
from llmtrain.train.matrices import Matrix, matrix_parameters
from llmtrain.train.muon import Muon
from llmtrain.train.optimizer import AdamW
from llmtrain.train.partitions import Fragment
from llmtrain.train.reference import Reference, Step, flops

log = logging.getLogger(__name__)

RESOLUTION = 2.0**-23  # of float32, two roundings of half a unit
RELATIVE = 2e-4  # error of the update that float32 may make, over the whole tensor
SIZE, DECAY = 0.05, 0.05  # and of its size and its decay, where they are checked by themselves
# Matrix products of the reference, in floating-point operations: below a second of a GPU's time.
WORK = {"cpu": 1e10, "cuda": 2e12}
CPU_SHARE = 10  # a CPU looks at that many times fewer elements


class WrongUpdate(RuntimeError):
    """The optimizer did something else than it was configured to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements of a parameter that are looked at: one matrix of Muon's, or the first `cols`."""

    group: str
    name: str
    matrix: Matrix


@dataclass(frozen=True, kw_only=True)
class Owned:
    """What this rank owns of a part: places in the flattened parameter, copies from before the
    step (with "gradient") and live views."""

    part: int
    start: int
    end: int
    before: dict[str, Tensor]
    live: dict[str, Tensor]


# Sums over the elements of a part: d the change made, r the reference, o its part without decay,
# p the weight before; of each kind of state, its error and its reference.
SUMS = ("n", "dd", "rr", "ee", "pp", "oo", "op", "do", "dp", "noise", "s0", "r0", "s1", "r1")


class OptimizerCheck:
    """before(), the optimizer's step, after(): by all ranks. module: not yet in DeepSpeed's hands.

    elements: of all groups together that are looked at, at most.
    """

    def __init__(
        self,
        spec: AdamW | Muon,
        module: nn.Module,
        *,
        elements: int,
        world: World,
        device: torch.device,
    ):
        self.spec, self.world, self.device = spec, world, device
        self.reference = Reference(spec, device)
        elements = elements // CPU_SHARE if device.type == "cpu" else elements
        groups = [group for group in spec.all_groups(module) if group.members]
        self.groups = {group.name: group for group in groups}
        self.sizes = {
            group.name: {n: p.numel() for n, p in group.members.items()} for group in groups
        }
        cuts = matrix_parameters(module) if isinstance(spec, Muon) else {}
        self.parts: list[Part] = []
        for group in groups:
            if group.name == "matrices":
                self.parts += self.sample_matrices(cuts, elements // len(groups))
            else:
                self.parts += self.sample(group.name, elements // len(groups))

    def sample(self, group: str, elements: int) -> list[Part]:
        sizes = {name: max(1, min(n, elements // 4)) for name, n in self.sizes[group].items() if n}
        chosen = within(list(sizes), sizes.get, elements)
        whole = {name: Matrix(start=0, rows=1, cols=sizes[name]) for name in chosen}
        return [Part(group=group, name=name, matrix=m) for name, m in whole.items()]

    def sample_matrices(self, cuts: dict[str, list[Matrix]], elements: int) -> list[Part]:
        every = [(name, matrix) for name, cut in cuts.items() for matrix in cut]
        work = WORK.get(self.device.type, WORK["cpu"])

        def share(item: tuple[str, Matrix]) -> float:
            cost = flops(item[1].rows, item[1].cols, self.spec.ns_steps)
            return max(item[1].numel / elements, cost / work)

        chosen = within(every, share, 1.0)
        return [Part(group="matrices", name=name, matrix=matrix) for name, matrix in chosen]

    def before(self, fragments: list[Fragment], gradient: Callable[[Fragment], Tensor]) -> None:
        """Copy what the step will change. fragments: those that this rank writes to a checkpoint,
        together every element once; gradient: of a fragment, reduced."""
        by_name: dict[str, list[int]] = {}
        for number, part in enumerate(self.parts):
            by_name.setdefault(part.name, []).append(number)
        self.owned = []
        for fragment in fragments:
            numbers = by_name.get(fragment.name, [])
            views = fragment.views | ({"gradient": gradient(fragment)} if numbers else {})
            end = fragment.offset + fragment.views["param"].numel()
            for number in numbers:
                matrix = self.parts[number].matrix
                low, high = max(matrix.start, fragment.offset), min(matrix.end, end)
                if low < high:
                    cut = {
                        k: v[low - fragment.offset : high - fragment.offset]
                        for k, v in views.items()
                    }
                    self.owned.append(
                        Owned(
                            part=number,
                            start=low,
                            end=high,
                            before={kind: view.clone() for kind, view in cut.items()},
                            live={kind: cut[kind] for kind in fragment.views},
                        )
                    )

    def after(self, step: Step) -> None:
        """Compare and log a line for each group. WrongUpdate on all ranks if one is wrong."""
        table = torch.zeros(len(self.parts), len(SUMS), dtype=torch.float64, device=self.device)
        whole = self.gather(step)
        orthogonal: dict[int, tuple[Tensor, float]] = {}
        for own in self.owned:
            part = self.parts[own.part]
            before = {kind: view.double() for kind, view in own.before.items()}
            lr = self.groups[part.group].lr * step.ratio
            if own.part in whole:
                if own.part not in orthogonal:
                    orthogonal[own.part] = self.reference.orthogonal(part.matrix, whole[own.part])
                update, noise = orthogonal[own.part]
                cut = slice(own.start - part.matrix.start, own.end - part.matrix.start)
                change = -lr * self.reference.scale(part.matrix) * update[cut]
                states = {"momentum": self.reference.momentum(before, step)[0]}
            else:
                change, states = self.reference.adamw(before, lr, step)
                noise = 0.0
            table[own.part] += self.sums(own, before, change, states, lr, noise)
        self.owned = []
        if self.world.size > 1:
            dist.all_reduce(table)
        for line in self.judge([dict(zip(SUMS, row)) for row in table.tolist()], step):
            log.info(line)

    def gather(self, step: Step) -> dict[int, Tensor]:
        """Part -> what is to be orthogonalised, whole, of Muon's matrices; on every rank."""
        numbers = [i for i, part in enumerate(self.parts) if part.group == "matrices"]
        sizes = [self.parts[i].matrix.numel for i in numbers]
        packed = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        views = dict(zip(numbers, packed.split(sizes)))
        for own in self.owned:
            if own.part in views:
                before = {kind: view.double() for kind, view in own.before.items()}
                start = self.parts[own.part].matrix.start
                views[own.part][own.start - start : own.end - start] = self.reference.momentum(
                    before, step
                )[1]
        if numbers and self.world.size > 1:
            dist.all_reduce(packed)
        return views

    def sums(
        self,
        own: Owned,
        before: dict[str, Tensor],
        change: Tensor,
        states: dict[str, Tensor],
        lr: float,
        noise: float,
    ) -> Tensor:
        """A row of the table, of what this rank owns."""
        p, o = before["param"], change
        d = own.live["param"].double() - p
        r = o - lr * self.groups[self.parts[own.part].group].weight_decay * p
        pairs = [(d, d), (r, r), (d - r, d - r), (p, p), (o, o), (o, p), (d, o), (d, p)]
        row = [torch.full_like(d[0], d.numel()), *((a * b).sum() for a, b in pairs)]
        row.append(torch.full_like(d[0], noise * d.numel()))
        for kind, expected in states.items():
            error = own.live[kind].double() - expected
            row += [(error * error).sum(), (expected * expected).sum()]
        row += [torch.zeros_like(d[0])] * (len(SUMS) - len(row))
        return torch.stack(row)

    def judge(self, table: list[dict[str, float]], step: Step) -> list[str]:
        """A line for each group. WrongUpdate for the first part that is wrong."""
        lines = []
        for name, group in self.groups.items():
            rows = [
                (part, row)
                for part, row in zip(self.parts, table)
                if part.group == name and row["n"]
            ]
            for part, row in rows:
                if wrong := self.fault(row, lr=group.lr * step.ratio, part=part):
                    raise WrongUpdate(
                        f"optimizer check: group {name!r}, {part.name}: {wrong}, at optimizer step "
                        f"{step.count} with lr {group.lr * step.ratio:.3g}. The optimizer does not "
                        "do what its configuration says; nothing was saved after this step. Update "
                        "or correct it; health.optimizer_check=false trains regardless"
                    )
            n, dd, rr, ee = (sum(row[key] for _, row in rows) for key in ("n", "dd", "rr", "ee"))
            lines.append(
                f"optimizer check: {name}: update rms {math.sqrt(dd / n):.4e}, reference "
                f"{math.sqrt(rr / n):.4e}, relative error {math.sqrt(ee / max(rr, 1e-300)):.1e} "
                f"({n:,.0f} of {sum(self.sizes[name].values()):,} elements)"
            )
        return lines

    def fault(self, row: dict[str, float], *, lr: float, part: Part) -> str | None:
        """What is wrong with an update, in words."""
        n, decay = row["n"], lr * self.groups[part.group].weight_decay
        blur, rr = RESOLUTION * math.sqrt(row["pp"]), math.sqrt(row["rr"])
        noise = row["noise"] / n
        error, allowed = math.sqrt(row["ee"]), max(RELATIVE, 3 * noise) * rr + blur + 1e-30
        if not error <= allowed:
            return (
                f"got an update of rms {math.sqrt(row['dd'] / n):.4e}, expected "
                f"{math.sqrt(row['rr'] / n):.4e}; their difference has rms "
                f"{error / math.sqrt(n):.4e}, allowed is {allowed / math.sqrt(n):.4e}"
            )
        for index, kind in enumerate(self.groups[part.group].state):
            error, size = math.sqrt(row[f"s{index}"]), math.sqrt(row[f"r{index}"])
            if not error <= RELATIVE * size + 1e-30:
                return (
                    f"got a state {kind} that is off by {error / max(size, 1e-300):.1e} of its size"
                )
        fit = self.fit(row)
        if fit is None or noise <= RELATIVE:
            return None
        size, along = fit
        if abs(size - 1) > SIZE + blur / rr:
            return f"got an update of {size:.3f} times the expected size"
        left = 6 * math.sqrt(row["ee"] / row["pp"] / n) + 2 * RESOLUTION
        if abs(along + decay) > DECAY * decay + left:
            return f"got a decay of {-along:.3e} of the weights, expected {decay:.3e}"
        return None

    def fit(self, row: dict[str, float]) -> tuple[float, float] | None:
        """(a, b) of the change made, as a * (reference without decay) + b * weights."""
        determinant = row["oo"] * row["pp"] - row["op"] ** 2
        if row["n"] < 100 or determinant <= 0.01 * row["oo"] * row["pp"]:
            return None
        a = (row["do"] * row["pp"] - row["dp"] * row["op"]) / determinant
        b = (row["dp"] * row["oo"] - row["do"] * row["op"]) / determinant
        return a, b


def within(items: list, cost: Callable, budget: float) -> list:
    """The costliest and the cheapest, then others from the cheapest on while the budget lasts."""
    ordered = sorted(items, key=cost)
    chosen, spent = [], 0.0
    for item in [*ordered[-1:], *ordered[:-1]]:
        if len(chosen) >= 2 and spent + cost(item) > budget:
            break
        chosen.append(item)
        spent += cost(item)
    return chosen
