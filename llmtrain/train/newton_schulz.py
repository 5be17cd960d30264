"""Orthogonalisation of matrices by the Newton-Schulz iteration, batched over equal shapes.

    X_0 = G / |G|_F
    A   = X X^T
    X   = a X + (b A + c A^2) X            steps times

With G = U S V^T the result is U S' V^T, singular values S' mostly between 0.7 and 1.2: coefficients
are chosen for a large slope at zero rather than for convergence (Jordan 2024,
https://kellerjordan.github.io/posts/muon/). Those of torch.optim.Muon. FLOPs of an R x C matrix,
R <= C: steps * (4 R^2 C + 2 R^3).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # least norm that is divided by
BATCH_ELEMENTS = 1 << 26  # of matrices that are worked on at once


def newton_schulz(x_NRC: Tensor, steps: int) -> Tensor:
    """Every matrix of a batch orthogonalised, in the dtype of the batch; R <= C is faster."""
    a, b, c = COEFFICIENTS
    exact = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=exact)
    x_NRC = x_NRC / norm_N.clamp(min=EPS).to(x_NRC.dtype)
    for _ in range(steps):
        gram_NRR = x_NRC @ x_NRC.mT
        both_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, both_NRR, x_NRC, beta=a)
    return x_NRC


def orthogonalise(matrices: list[Tensor], *, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Each [R, C] orthogonalised, computed and given in that dtype."""
    found: list[Tensor | None] = [None] * len(matrices)
    by_shape = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[tuple(sorted(matrix.shape))].append(i)
    for (short, long), indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (short * long))
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            x_NRC = torch.empty(
                len(chosen), short, long, dtype=dtype, device=matrices[chosen[0]].device
            )
            for x_RC, i in zip(x_NRC, chosen):
                x_RC.copy_(wide(matrices[i]))
            for y_RC, i in zip(newton_schulz(x_NRC, steps), chosen):
                found[i] = y_RC if matrices[i].shape == y_RC.shape else y_RC.mT
    return found


def wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def flops(rows: int, cols: int, steps: int) -> float:
    """Floating-point operations of one matrix."""
    short, long = sorted((rows, cols))
    return steps * (4.0 * short**2 * long + 2.0 * short**3)
