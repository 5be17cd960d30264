"""Linear layer of the house: float32 parameters, computing in the dtype of its input.

The trainer keeps every parameter in float32 (they are the master weights) and chooses the compute
dtype once, at the embedding; from there activations carry it. No autocast is involved, so float64
tests, compile and ZeRO see the same code.

A trainer whose weights stay the same over several micro-batches may hand a layer a copy in the
compute dtype (train/copies.py), so that it is not cast anew for each of them: the same values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llmtrain_kernels.float8 import QuantisedWeight, float8_linear
from torch import Tensor, nn


def cast_parameter(weight: Tensor, like: Tensor) -> Tensor:
    """A parameter in the dtype of an activation (itself when equal)."""
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


class FromCopy(torch.autograd.Function):
    """(weight, its copy in another dtype) -> the copy, with the weight's gradient."""

    @staticmethod
    def forward(ctx, weight, copy):
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class Linear(nn.Linear):
    """y = x W^T + b with W cast to x's dtype; W ~ N(0, init_std), b = 0.

    Set by a trainer: weight_copy, W in the compute dtype; float8, the scaling of float8 products,
    and then quantised, W as they take it, or None to quantise it at every call.
    """

    weight_copy: Tensor | None = None
    float8: str | None = None
    float8_backend: str = "scaled_mm"
    quantised: QuantisedWeight | None = None

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, init_std: float = 0.02):
        self.init_std = init_std
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast_parameter(self.bias, x)
        if self.float8 is not None and self.training:
            y = float8_linear(
                x,
                self.weight,
                scaling=self.float8,
                quantised=self.quantised,
                backend=self.float8_backend,
            )
            return y if bias is None else y + bias
        return F.linear(x, self.compute_weight(x), bias)

    def compute_weight(self, x: Tensor) -> Tensor:
        """W in the dtype of x: its copy, where there is one."""
        if self.weight_copy is not None and self.weight_copy.dtype == x.dtype:
            return FromCopy.apply(self.weight, self.weight_copy)
        return cast_parameter(self.weight, x)

    def flops_per_token(self) -> float:
        return 2.0 * self.in_features * self.out_features
