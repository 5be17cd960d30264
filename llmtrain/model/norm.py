"""Normalisation over the width of a token, with statistics in at least float32.

RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4): y = x / sqrt(mean(x^2) + eps) * w
    zero_centered (Gemma, arXiv:2403.08295; Qwen3-Next):    y = x / sqrt(mean(x^2) + eps) * (1 + w)
LayerNorm (Ba et al. 2016, arXiv:1607.06450, eq. 4):        y = (x - mean) / sqrt(var + eps) * w + b

torch's fused operators are used with weights in the dtype of x: they compute in float32 inside when
x is half precision, and keep only x and one statistic a token for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.linear import cast_parameter


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        gain = 1 + self.weight if self.zero_centered else self.weight
        return F.rms_norm(x_BTD, gain.shape, cast_parameter(gain, x_BTD), self.eps)


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight = cast_parameter(self.weight, x_BTD)
        bias = None if self.bias is None else cast_parameter(self.bias, x_BTD)
        return F.layer_norm(x_BTD, self.weight.shape, weight, bias, self.eps)
