"""AdamW as its paper writes it (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """The definition, in the tensors' dtype. Arguments as op.adamw_step()."""
    if found_inf is None or found_inf.item() != 1:
        for p, g, m, v, step in zip(parameters, gradients, means, squares, steps, strict=True):
            step += 1
            g = g if grad_scale is None else g / grad_scale.to(g.dtype)
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            mean = m / (1 - beta1 ** step.item())
            square = v / (1 - beta2 ** step.item())
            p.copy_((1 - lr * weight_decay) * p - lr * mean / (square.sqrt() + eps))
    for copy, p in zip(copies or (), parameters):
        copy.copy_(p)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Over all elements of all tensors, in float64."""
    return torch.stack([z.double().square().sum() for z in tensors]).sum()
