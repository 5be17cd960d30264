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
    x_NRC: Tensor,
    other_NRC: Tensor | None = None,
    add_NRR: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
) -> Tensor:
    """alpha x other^T + beta add + diagonal I."""
    factors = x_NRC, (x_NRC if other_NRC is None else other_NRC).mT
    if add_NRR is not None:
        product_NRR = torch.baddbmm(add_NRR, *factors, beta=beta, alpha=alpha)
    elif alpha != 1:  # added to nothing: for the factor, in the product's own sums
        nothing = x_NRC.new_empty(1, 1, 1).expand(len(x_NRC), x_NRC.shape[1], x_NRC.shape[1])
        product_NRR = torch.baddbmm(nothing, *factors, beta=0, alpha=alpha)
    else:
        product_NRR = torch.bmm(*factors)
    if diagonal != 0:
        product_NRR.diagonal(dim1=1, dim2=2).add_(diagonal)
    return product_NRR
