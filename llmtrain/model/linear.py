"""Linear layer of the house: float32 parameters, computing in the dtype of its input.

The trainer keeps every parameter in float32 (they are the master weights) and chooses the compute
dtype once, at the embedding; from there activations carry it. No autocast is involved, so float64
tests, compile and ZeRO see the same code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def cast_parameter(weight: Tensor, like: Tensor) -> Tensor:
    """A parameter in the dtype of an activation (itself when equal)."""
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


class Linear(nn.Linear):
    """y = x W^T + b with W cast to x's dtype; W ~ N(0, init_std), b = 0."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, init_std: float = 0.02):
        self.init_std = init_std
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast_parameter(self.bias, x)
        return F.linear(x, cast_parameter(self.weight, x), bias)

    def flops_per_token(self) -> float:
        return 2.0 * self.in_features * self.out_features
