"""Linear layer of the house: float32 parameters, computing in the dtype of its input.

The trainer keeps every parameter in float32 (they are the master weights) and chooses the compute
dtype once, at the embedding; from there activations carry it. No autocast is involved, so float64
tests, compile and ZeRO see the same code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b with W cast to x's dtype; W ~ N(0, init_std), truncated at 3 std, b = 0."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, init_std: float = 0.02):
        self.init_std = init_std
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return
        std = self.init_std
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def flops_per_token(self) -> float:
        return 2.0 * self.in_features * self.out_features


def cast_parameter(weight: Tensor, like: Tensor) -> Tensor:
    """A parameter in the dtype of an activation (a no-op when equal)."""
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


