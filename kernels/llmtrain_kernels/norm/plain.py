"""The norms by torch's own operators, which keep x and one statistic a row for the backward pass.

Gains and offsets are cast to x's dtype, as torch's fused norms ask. Where groups have gains of
their own, or a gate follows, it is an operation after the norm, and one more rounding where x is
half precision. silu is float32 (at least), sigmoid of the gate's dtype. Arguments as the functions
of op.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.norm.reference import GATE_LIMIT


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    group_width: int | None = None,
) -> Tensor:
    gain = cast(1 + weight if zero_centered else weight, x)
    if group_width is None:
        return F.rms_norm(x, gain.shape, gain, eps)
    groups = x.unflatten(-1, (-1, group_width))
    return F.rms_norm(groups, (group_width,), None, eps).flatten(-2) * gain


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, eps=eps, zero_centered=zero_centered), h


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    group_width: int | None = None,
) -> Tensor:
    weight, bias = cast(weight, x), None if bias is None else cast(bias, x)
    if group_width is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    groups = x.unflatten(-1, (-1, group_width))
    y = F.layer_norm(groups, (group_width,), None, None, eps).flatten(-2) * weight
    return y if bias is None else y + bias


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return layer_norm(h, weight, bias, eps=eps), h


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_width: int | None = None,
    norm_before_gate: bool,
    activation: str = "silu",
) -> Tensor:
    opened = activated(gate, activation)
    if norm_before_gate:
        y = rms_norm(x, weight, eps=eps, group_width=group_width) * opened
    else:
        y = rms_norm(x * opened, weight, eps=eps, group_width=group_width)
    return y.to(gate.dtype)


def gated_layer_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    group_width: int | None = None,
    norm_before_gate: bool,
    activation: str = "silu",
) -> Tensor:
    opened = activated(gate, activation)
    if norm_before_gate:
        y = layer_norm(x, weight, bias, eps=eps, group_width=group_width) * opened
    else:
        y = layer_norm(x * opened, weight, bias, eps=eps, group_width=group_width)
    return y.to(gate.dtype)


def cast(weight: Tensor, like: Tensor) -> Tensor:
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


def activated(gate: Tensor, activation: str) -> Tensor:
    """silu of the gate, in at least float32, or its sigmoid."""
    if activation == "sigmoid":
        return gate.clamp(-GATE_LIMIT, GATE_LIMIT).sigmoid()
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return F.silu(gate.clamp(-GATE_LIMIT, GATE_LIMIT))
