"""The Newton-Schulz iteration over a batch of equal shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels.cost import Cost
from llmtrain_kernels.muon.op import symmetric_cost, symmetric_matmul

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # least norm that is divided by


def newton_schulz(x_NRC: Tensor, steps: int, *, backend: str = "auto") -> Tensor:
    """Every matrix of a batch orthogonalised, in the dtype of the batch. S is the smaller of R and
    C: tall matrices are multiplied from the right, where nothing needs to be transposed. backend:
    of the symmetric products."""
    a, b, c = COEFFICIENTS
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    exact = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=exact)
    x_NRC = x_NRC / norm_N.clamp(min=EPS).to(x_NRC.dtype)
    for _ in range(steps):
        gram_NSS = symmetric_matmul(x_NRC.mT if tall else x_NRC, backend=backend)
        both_NSS = symmetric_matmul(gram_NSS, gram_NSS, beta=b, alpha=c, backend=backend)
        left, right = (x_NRC, both_NSS) if tall else (both_NSS, x_NRC)
        x_NRC = torch.baddbmm(x_NRC, left, right, beta=a)
    return x_NRC


def one_by_one(x_NRC: Tensor, steps: int) -> Tensor:
    """The definition: each matrix by itself, transposed if it is tall, whole products."""
    a, b, c = COEFFICIENTS
    found = []
    for x_RC in x_NRC:
        tall = x_RC.shape[0] > x_RC.shape[1]
        x_RC = x_RC.mT if tall else x_RC
        x_RC = x_RC / x_RC.norm().clamp(min=EPS)
        for _ in range(steps):
            gram_RR = x_RC @ x_RC.mT
            both_RR = torch.addmm(gram_RR, gram_RR, gram_RR, beta=b, alpha=c)
            x_RC = torch.addmm(x_RC, both_RR, x_RC, beta=a)
        found.append(x_RC.mT if tall else x_RC)
    return torch.stack(found)


def iteration_cost(n: int, rows: int, cols: int, steps: int, *, itemsize: int) -> Cost:
    """Of newton_schulz(): two symmetric products by halves and a whole one a step; bytes of the
    batch in and out, as if the rest stayed on the chip."""
    short, long = sorted((rows, cols))
    halves = symmetric_cost(n, short, long, itemsize=itemsize)
    squares = symmetric_cost(n, short, short, itemsize=itemsize, add=True)
    flops = halves.flops + squares.flops + 2.0 * n * short * short * long
    size = float(n) * rows * cols * itemsize
    return Cost(flops=steps * flops, bytes_read=size, bytes_written=size)
