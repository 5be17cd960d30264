"""Orthogonalisation of matrices by the Newton-Schulz iteration, batched over equal shapes.

    X_0 = G / |G|_F
    A   = X X^T
    X   = a X + (b A + c A^2) X            steps times

With G = U S V^T the result is U S' V^T, singular values S' mostly between 0.7 and 1.2: coefficients
are chosen for a large slope at zero rather than for convergence (Jordan 2024,
https://kellerjordan.github.io/posts/muon/). Those of torch.optim.Muon. llmtrain_kernels.muon takes
several steps on one A, and computes half of what is symmetric on a GPU.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from llmtrain_kernels.muon import newton_schulz
from torch import Tensor

BATCH_ELEMENTS = 1 << 26  # of matrices that are worked on at once


def orthogonalise(matrices: list[Tensor], *, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Each [R, C] orthogonalised, computed and given in that dtype, contiguous. They are divided by
    their norms in their own dtype: float16 has no room for what gradients may be."""
    found: list[Tensor | None] = [None] * len(matrices)
    by_shape = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(i)
    for (rows, cols), indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (rows * cols))
        for first in range(0, len(indices), size):
            chosen = indices[first : first + size]
            x_NRC = matrices[chosen[0]].new_empty(len(chosen), rows, cols)
            torch._foreach_copy_(list(x_NRC.unbind()), [matrices[i] for i in chosen])
            for y_RC, i in zip(newton_schulz(x_NRC, steps, dtype=dtype), chosen):
                found[i] = y_RC
    return found
