"""Normalisation over the width of a token, with statistics in at least float32.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4): y = x / sqrt(mean(x^2) + eps) * w
    zero_centered (Gemma, arXiv:2403.08295; Qwen3-Next):    y = x / sqrt(mean(x^2) + eps) * (1 + w)
LayerNorm (Ba et al. 2016, arXiv:1607.06450, eq. 4):        y = (x - mean) / sqrt(var + eps) * w + b
GatedRMSNorm (Mamba-2, arXiv:2405.21060):  y = norm(x silu(z)) or, before the gate, norm(x) silu(z)

With a residual the first two add it before they normalise, in one operation. llmtrain_kernels.norm
computes: on a GPU kernels that read float32 gains, elsewhere torch's fused operators with weights
in the dtype of x. Either keeps x and one statistic a token (two of LayerNorm) for the backward
pass.
"""

from __future__ import annotations

import torch
from llmtrain_kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    gated_rms_norm,
    layer_norm,
    rms_norm,
)
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x_..D -> y_..D of the same dtype. One gain a channel, first 1.

    zero_centered: the parameter is the gain less 1, so that what pulls it to 0 pulls the gain to 1.
    """

    def __init__(self, d_model: int, *, eps: float = 1e-5, zero_centered: bool = False):
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered
        self.weight = nn.Parameter(torch.empty(d_model))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(
        self, x_BTD: Tensor, residual_BTD: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with a residual (y, h): h = x + residual, and y the norm of h."""
        options = {"eps": self.eps, "zero_centered": self.zero_centered}
        if residual_BTD is None:
            return rms_norm(x_BTD, self.weight, **options)
        return add_rms_norm(x_BTD, residual_BTD, self.weight, **options)


class LayerNorm(nn.Module):
    """x_..D -> y_..D of the same dtype. One gain a channel, first 1, and one offset, first 0."""

    def __init__(self, d_model: int, *, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x_BTD: Tensor, residual_BTD: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with a residual (y, h): h = x + residual, and y the norm of h."""
        if residual_BTD is None:
            return layer_norm(x_BTD, self.weight, self.bias, eps=self.eps)
        return add_layer_norm(x_BTD, residual_BTD, self.weight, self.bias, eps=self.eps)


class GatedRMSNorm(nn.Module):
    """norm(y * silu(z)) or norm(y) * silu(z), of z's dtype, with one gain a channel, first 1.

    norm divides by the root mean square over each of so many groups of neighbouring channels. In
    float32 (at least). Ours: gates are clamped at 1e4 (GATE_LIMIT of
    llmtrain_kernels.norm), so that no finite value of them makes a NaN.
    """

    def __init__(self, width: int, *, groups: int = 1, before_gate: bool, eps: float):
        super().__init__()
        self.groups, self.before_gate, self.eps = groups, before_gate, eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y_BTF: Tensor, z_BTF: Tensor) -> Tensor:
        return gated_rms_norm(
            y_BTF,
            z_BTF,
            self.weight,
            eps=self.eps,
            group_width=None if self.groups == 1 else self.weight.numel() // self.groups,
            norm_before_gate=self.before_gate,
        )


def add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = x + residual, in one operation where the norm has it. By a call of the
    module, because hooks on calls are what gathers parameters that ZeRO has split."""
    if isinstance(norm, RMSNorm | LayerNorm):
        return norm(x, residual)
    h = x + residual
    return norm(h), h
