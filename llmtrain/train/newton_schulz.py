"""Orthogonalisation of matrices by the Newton-Schulz iteration, batched over equal shapes.

    X_0 = G / |G|_F
    A   = X X^T
    X   = a X + (b A + c A^2) X            steps times

A and b A + c A^2 are symmetric; llmtrain_kernels.muon computes half of them on a GPU.
With G = U S V^T the result is U S' V^T, singular values S' mostly between 0.7 and 1.2: coefficients
are chosen for a large slope at zero rather than for convergence (Jordan 2024,
https://kellerjordan.github.io/posts/muon/). Those of torch.optim.Muon. FLOPs of an R x C matrix,
R <= C: steps * (4 R^2 C + 2 R^3), by halves steps * (3 R^2 C + R^3).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from llmtrain_kernels.muon import COEFFICIENTS, EPS, newton_schulz
from torch import Tensor

__all__ = ["COEFFICIENTS", "EPS", "flops", "newton_schulz", "orthogonalise"]

BATCH_ELEMENTS = 1 << 26  # of matrices that are worked on at once


def orthogonalise(matrices: list[Tensor], *, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Each [R, C] orthogonalised, computed and given in that dtype, contiguous."""
    found: list[Tensor | None] = [None] * len(matrices)
    by_shape = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(i)
    for (rows, cols), indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (rows * cols))
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            device = matrices[chosen[0]].device
            x_NRC = torch.empty(len(chosen), rows, cols, dtype=dtype, device=device)
            torch._foreach_copy_(list(x_NRC.unbind()), [matrices[i] for i in chosen])
            for y_RC, i in zip(newton_schulz(x_NRC, steps), chosen):
                found[i] = y_RC
    return found


def flops(rows: int, cols: int, steps: int) -> float:
    """Floating-point operations of one matrix."""
    short, long = sorted((rows, cols))
    return steps * (4.0 * short**2 * long + 2.0 * short**3)
