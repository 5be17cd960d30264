"""Linear layer of the house: float32 parameters, computing in the dtype of its input.

The trainer keeps every parameter in float32 (they are the master weights) and chooses the compute
dtype once, at the embedding; from there activations carry it. No autocast is involved, so float64
tests, compile and ZeRO see the same code.

A trainer whose weights stay the same over several micro-batches may hand a layer a copy in the
compute dtype (train/copies.py), so that it is not cast anew for each of them: the same values.
On a GPU the weight's gradient then leaves its product in float32, unrounded, and layers that read
one input add up their gradients of it within the products (linears()).
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
        if takes_copy(self, x):
            return LinearsFromCopies.apply(x, 1, self.weight, self.weight_copy)[0]
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


def takes_copy(layer: Linear, x: Tensor) -> bool:
    """Whether LinearsFromCopies computes. Not with a bias, whose addition belongs to the product,
    nor where the copy is kept for evaluation beside float8 training."""
    return (
        x.is_cuda
        and layer.bias is None
        and layer.weight_copy is not None
        and layer.weight_copy.dtype == x.dtype
        and not (layer.float8 is not None and layer.training)
    )


def linears(x: Tensor, *layers: Linear) -> list[Tensor]:
    """[layer(x) for layer in layers]; where they have copies, on a GPU, the gradient of x is one
    memory that each layer's product is added to, instead of a tensor a layer and their sum."""
    if not all(takes_copy(layer, x) for layer in layers):
        return [layer(x) for layer in layers]
    weights = [layer.weight for layer in layers]
    return list(
        LinearsFromCopies.apply(x, len(layers), *weights, *(layer.weight_copy for layer in layers))
    )


class LinearsFromCopies(torch.autograd.Function):
    """(x_..D, their number, weights_OD, their copies in x's dtype) -> x W^T of each."""

    @staticmethod
    def forward(ctx, x, number, *tensors):
        weights, copies = tensors[:number], tensors[number:]
        ctx.save_for_backward(x, *copies)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(F.linear(x, copy) for copy in copies)

    @staticmethod
    def backward(ctx, *dys):
        x, *copies = ctx.saved_tensors
        dys, x_ND = [dy.flatten(0, -2) for dy in dys], x.flatten(0, -2)
        needs_x, _, *needs = ctx.needs_input_grad
        dx = sum_of_products(dys, copies).view_as(x) if needs_x else None
        gradients = [
            product_in(dy.mT, x_ND, dtype) if need else None
            for dy, dtype, need in zip(dys, ctx.dtypes, needs)
        ]
        return dx, None, *gradients, *(None for _ in copies)


# Operators, since torch.compile would make the sums and the casts apart from the products.


@torch.library.custom_op("llmtrain::sum_of_products", mutates_args=())
def sum_of_products(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
    """sum_i rows_i[N, O_i] weights_i[O_i, D], each added as its product ends."""
    total = rows[0] @ weights[0]
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(row, weight)
    return total


@sum_of_products.register_fake
def _(rows, weights):
    return rows[0].new_empty(rows[0].shape[0], weights[0].shape[1])


@torch.library.custom_op("llmtrain::product_in", mutates_args=())
def product_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, [M, K] [K, N], in another dtype; on a GPU float32 without a rounding between."""
    if a.is_cuda and dtype == torch.float32 and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


@product_in.register_fake
def _(a, b, dtype):
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
