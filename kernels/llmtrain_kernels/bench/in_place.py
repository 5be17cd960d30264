"""Steps that change their inputs, as functions that do not: for what checks and times them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Working copies of p, g, m, v and the counters: one list each.
State = tuple[list[Tensor], ...]
Step = Callable[[State], None]


class InPlace:
    """p, g, m, v -> p, m, v after a step. The first call for some inputs works on copies of them,
    the next ones go on from there, so that later calls copy nothing. cut: makes lists of them."""

    def __init__(self, step: Step, cut: Callable[[Tensor], list[Tensor]]):
        self.step, self.cut, self.source, self.kept = step, cut, None, ()

    def __call__(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if self.source is not p:
            self.source, self.kept = p, (p.clone(), m.clone(), v.clone())
            new_p, new_m, new_v = self.kept
            lists = tuple(self.cut(z) for z in (new_p, g, new_m, new_v))
            counters = [torch.full((), 9.0, device=p.device) for _ in lists[0]]
            self.state = (*lists, counters)
        self.step(self.state)
        return self.kept


class TorchAdamW:
    """A Step by torch.optim.AdamW itself."""

    def __init__(self, options: dict, **how: bool):
        self.options, self.how, self.optimizer = options, how, None

    def __call__(self, state: State) -> None:
        p, g, m, v, steps = state
        if self.optimizer is None:
            parameters = [torch.nn.Parameter(z) for z in p]
            known = {k: z for k, z in self.options.items() if not k.startswith("beta")}
            betas = (self.options["beta1"], self.options["beta2"])
            how = self.how | ({"capturable": True} if p[0].is_cuda else {})
            self.optimizer = torch.optim.AdamW(parameters, betas=betas, **known, **how)
            for parameter, *rest in zip(parameters, g, m, v, steps):
                parameter.grad, mean, square, step = rest
                self.optimizer.state[parameter] = {
                    "step": step,
                    "exp_avg": mean,
                    "exp_avg_sq": square,
                }
        self.optimizer.step()
