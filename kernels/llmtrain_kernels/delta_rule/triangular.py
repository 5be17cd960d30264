"""Inverse of I + A for strictly lower triangular A, many at once.

Blocks of twice the size from blocks, starting with single numbers, whose inverse is 1:

    [ P  0 ]^-1    [     P^-1         0   ]
    [ L  Q ]     = [ -Q^-1 L P^-1   Q^-1  ]

Every intermediate is a part of the result. That matters here: with unit keys and beta <= 2 the
entries of the inverse stay below 2, while the powers of A in the series I - A + A^2 - ..., however
it is summed, reach 1e20 for equal keys and leave nothing of float32. Forward substitution row by
row is as exact, but is C dependent steps; this is log2 C.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this size a product of blocks is a broadcast multiply and sum: batched matrix products of
# a few numbers each spend their time on calls.
SMALLEST_PRODUCT = 8


class UnitLowerInverse(torch.autograd.Function):
    """X = (I + A)^-1 with d A = -X^T (d X) X^T below the diagonal; keeps X alone."""

    @staticmethod
    def forward(ctx, a_XCC: Tensor) -> Tensor:
        inverse_XCC = blockwise_inverse(a_XCC)
        ctx.save_for_backward(inverse_XCC)
        return inverse_XCC

    @staticmethod
    def backward(ctx, gradient_XCC: Tensor) -> Tensor:
        (inverse_XCC,) = ctx.saved_tensors
        return -(inverse_XCC.mT @ gradient_XCC @ inverse_XCC.mT).tril(-1)


def unit_lower_inverse(a_XCC: Tensor) -> Tensor:
    """(I + tril(A, -1))^-1 of matrices of any leading shape X, C a power of two.

    What stands on and above A's diagonal is not read. Float32 or float64, as given.
    """
    return UnitLowerInverse.apply(a_XCC)


def blockwise_inverse(a_XCC: Tensor) -> Tensor:
    *lead, size, _ = a_XCC.shape
    # the inverses of the diagonal blocks of `block` rows: [X, size / block, block, block]
    inverses = a_XCC.new_ones(*lead, size, 1, 1)
    block = 1
    while block < size:
        upper, lower = inverses[..., 0::2, :, :], inverses[..., 1::2, :, :]
        pairs = a_XCC.unflatten(-1, (-1, 2 * block)).unflatten(-3, (-1, 2 * block))
        left = pairs.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., block:, :block]
        corner = -product(lower, product(left, upper))
        inverses = torch.cat(
            [
                torch.cat([upper, torch.zeros_like(upper)], dim=-1),
                torch.cat([corner, lower], dim=-1),
            ],
            dim=-2,
        )
        block *= 2
    return inverses[..., 0, :, :]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for square blocks."""
    if a.shape[-1] >= SMALLEST_PRODUCT:
        return a @ b
    return (a[..., None] * b[..., None, :, :]).sum(dim=-2)
