"""The optimizers' updates in float64, written for reading: what the truth check compares with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from llmtrain_kernels.muon import COEFFICIENTS, EPS
from torch import Tensor

from llmtrain.train.matrices import Matrix
from llmtrain.train.muon import Muon, averages_dtype
from llmtrain.train.optimizer import AdamW


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the configuration says of a step. ratio: of the schedule; count: optimizer steps with
    this one; factor: by which the reduced gradients are multiplied."""

    ratio: float
    count: int
    factor: float


class Reference:
    """Of tensors in float64; before: "gradient", as it was reduced, and the state."""

    def __init__(self, spec: AdamW | Muon, device: torch.device):
        self.spec, self.device = spec, device

    def adamw(
        self, before: dict[str, Tensor], lr: float, step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Change without decay, and the state after."""
        spec, gradient = self.spec, before["gradient"] * step.factor
        mean = spec.beta1 * before["exp_avg"] + (1 - spec.beta1) * gradient
        square = spec.beta2 * before["exp_avg_sq"] + (1 - spec.beta2) * gradient**2
        root = (square / (1 - spec.beta2**step.count)).sqrt() + spec.eps
        change = -lr * mean / (1 - spec.beta1**step.count) / root
        return change, {"exp_avg": mean, "exp_avg_sq": square}

    def momentum(self, before: dict[str, Tensor], step: Step) -> tuple[Tensor, Tensor]:
        """The momentum after the step, and what is to be orthogonalised."""
        mu, gradient = self.spec.momentum, before["gradient"] * step.factor
        mean = mu * before["momentum"] + (1 - mu) * gradient
        return mean, mu * mean + (1 - mu) * gradient if self.spec.nesterov else mean

    def orthogonal(self, matrix: Matrix, update: Tensor) -> tuple[Tensor, float]:
        """The flattened result in float64, and how far the optimizer's dtype is from it."""
        dtype = self.spec.dtype_on(self.device)
        x_RC = update.view(matrix.rows, matrix.cols).to(averages_dtype(dtype))  # what it is given
        exact, rough = (
            iterate(x_RC.double(), self.spec.ns_steps, kind) for kind in (torch.float64, dtype)
        )
        noise = (rough.double() - exact).norm() / exact.norm().clamp(min=1e-300)
        return exact.reshape(-1), noise.item()

    def scale(self, matrix: Matrix) -> float:
        tall, across = matrix.row_growth, matrix.col_growth
        rows, cols = matrix.rows / tall, matrix.cols / across
        if self.spec.lr_scaling == "original":
            return math.sqrt(max(1.0, rows / cols) * tall / across)
        return 0.2 * math.sqrt(max(rows, cols) * tall / across)


def iterate(x_RC: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz in that dtype, written for reading."""
    a, b, c = COEFFICIENTS
    tall = x_RC.shape[0] > x_RC.shape[1]
    x_RC = x_RC.mT if tall else x_RC
    x_RC = (x_RC / x_RC.norm().clamp(min=EPS)).to(dtype)
    for _ in range(steps):
        gram_RR = x_RC @ x_RC.mT
        x_RC = a * x_RC + (b * gram_RR + c * gram_RR @ gram_RR) @ x_RC
    return x_RC.mT if tall else x_RC


def flops(rows: int, cols: int, steps: int) -> float:
    """Floating-point operations of iterate()."""
    short, long = sorted((rows, cols))
    return steps * (4.0 * short**2 * long + 2.0 * short**3)
