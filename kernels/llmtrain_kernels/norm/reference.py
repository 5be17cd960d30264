"""The norms by their equations, in plain torch. Arguments as the functions of op.py."""

from __future__ import annotations

import torch
from torch import Tensor

GATE_LIMIT = 1e4  # of a gate before its activation: squares of gated numbers stay finite
ACTIVATIONS = ("silu", "sigmoid")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    group_width: int | None = None,
) -> Tensor:
    gain = 1 + wide(weight) if zero_centered else weight
    return scaled(wide(x), gain, None, eps, group_width, centered=False).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    h = (wide(x) + wide(residual)).to(x.dtype)
    return rms_norm(h, weight, eps=eps, zero_centered=zero_centered), h


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    group_width: int | None = None,
) -> Tensor:
    return scaled(wide(x), weight, bias, eps, group_width, centered=True).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> tuple[Tensor, Tensor]:
    h = (wide(x) + wide(residual)).to(x.dtype)
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
    x, opened = wide(x), activated(gate, activation)
    if norm_before_gate:
        y = scaled(x, weight, None, eps, group_width, centered=False) * opened
    else:
        y = scaled(x * opened, weight, None, eps, group_width, centered=False)
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
    x, opened = wide(x), activated(gate, activation)
    if norm_before_gate:
        y = scaled(x, weight, bias, eps, group_width, centered=True) * opened
    else:
        y = scaled(x * opened, weight, bias, eps, group_width, centered=True)
    return y.to(gate.dtype)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activated(gate: Tensor, activation: str) -> Tensor:
    gate = wide(gate).clamp(-GATE_LIMIT, GATE_LIMIT)
    return gate * gate.sigmoid() if activation == "silu" else gate.sigmoid()


def scaled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    group_width: int | None,
    *,
    centered: bool,
) -> Tensor:
    """n(x) * weight + bias, of x in at least float32."""
    groups = x.unflatten(-1, (-1, group_width or x.shape[-1]))
    if centered:
        groups = groups - groups.mean(dim=-1, keepdim=True)
    groups = groups / (groups.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    y = groups.flatten(-2) * wide(weight)
    return y if bias is None else y + wide(bias)
