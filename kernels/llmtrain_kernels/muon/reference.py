"""Muon's element-wise parts and the product of a matrix with itself, as plain torch.

The order of operations is that of the optimizer before there were kernels: on a CPU a training
goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def momentum_step(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Tensor]:
    """The definition. Arguments as op.momentum_step()."""
    updates = []
    for gradient, mean in zip(gradients, momenta, strict=True):
        if grad_scale is not None:
            gradient = gradient / grad_scale
        new = torch.lerp(mean, gradient, 1.0 - momentum)
        if found_inf is None:
            mean.copy_(new)
        else:
            torch.where(found_inf > 0, mean, new, out=mean)
        if nesterov:
            torch.lerp(gradient, mean, momentum, out=new)
        if found_inf is not None:
            new = torch.where(found_inf > 0, torch.zeros_like(mean), new)
        updates.append(new.to(dtype))
    return updates


def apply_updates(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    rate: float,
    decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """The definition. Arguments as op.apply_updates()."""
    keep = torch.full_like(parameters[0].new_empty(()), 1.0 - decay)
    if found_inf is not None:
        keep = torch.where(found_inf > 0, torch.ones_like(keep), keep)
    torch.ops.aten._foreach_mul_.Tensor(list(parameters), keep)
    for parameter, update in zip(parameters, updates, strict=True):
        parameter.add_(update.view_as(parameter), alpha=-rate)


def symmetric_matmul(
    x_NRC: Tensor, add_NRR: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """alpha x x^T + beta add."""
    if add_NRR is None:
        product_NRR = x_NRC @ x_NRC.mT
        return product_NRR if alpha == 1 else alpha * product_NRR
    return torch.baddbmm(add_NRR, x_NRC, x_NRC.mT, beta=beta, alpha=alpha)
