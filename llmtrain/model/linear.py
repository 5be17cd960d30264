"""Linear layer of the house: float32 parameters, computing in the dtype of its input.

The trainer keeps every parameter in float32 (they are the master weights) and chooses the compute
dtype once, at the embedding; from there activations carry it. No autocast is involved, so float64
tests, compile and ZeRO see the same code.

A trainer whose weights stay the same over several micro-batches may hand a layer a copy in the
compute dtype (train/copies.py), so that it is not cast anew for each of them: the same values.
Layers that read one input then add up their gradients of it within the products (linears()).
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


def linears(x: Tensor, *layers: Linear) -> list[Tensor]:
    """[layer(x) for layer in layers].

    On a GPU, with copies of the weights at hand, the gradient of x is one memory to which each
    layer's product is added as it is made, instead of a tensor a layer and their sum.
    """
    joined = x.is_cuda and all(
        layer.bias is None  # its addition belongs to the product
        and layer.weight_copy is not None
        and layer.weight_copy.dtype == x.dtype
        and not (layer.float8 is not None and layer.training)
        for layer in layers
    )
    if not joined:
        return [layer(x) for layer in layers]
    return list(Joined.apply(x, *(layer.compute_weight(x) for layer in layers)))


class Joined(torch.autograd.Function):
    """(x_..D, weights_OD) -> x W^T of each, all in one dtype."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        dys = [dy.flatten(0, -2) for dy in dys]
        dx = sum_of_products(dys, weights).view_as(x) if ctx.needs_input_grad[0] else None
        x_ND = x.flatten(0, -2)
        needs = ctx.needs_input_grad[1:]
        return dx, *(dy.mT @ x_ND if need else None for dy, need in zip(dys, needs))


@torch.library.custom_op("llmtrain::sum_of_products", mutates_args=())
def sum_of_products(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
    """sum_i rows_i[N, O_i] weights_i[O_i, D], each added as its product ends. An operator, since
    torch.compile would make the sums apart from the products."""
    total = rows[0] @ weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(row, weight)
    return total


@sum_of_products.register_fake
def _(rows, weights):
    return rows[0].new_empty(rows[0].shape[0], weights[0].shape[1])
