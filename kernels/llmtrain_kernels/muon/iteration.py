"""The Newton-Schulz iteration over a batch of equal shapes, on Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels.cost import Cost
from llmtrain_kernels.muon.op import symmetric_cost, symmetric_matmul

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # least norm that is divided by
LONGEST = 3  # steps that one Gram matrix is good for
SCALE = 256.0  # a power of two: leaves the values' bits as they are


def newton_schulz(
    x_NRC: Tensor, steps: int, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """Every matrix of a batch orthogonalised: X = (a I + b A + c A^2) X with A = X X^T, steps times
    after X = X / |X|.

    All factors of X are polynomials of the first A, so they commute, and a group of steps is

        R = X X^T;  Z = a I + b R + c R^2;  Q = Z Q;  R = Z R Z  (each step);  X = Q X

    in which only R and Q X have the long side. Rounding takes R away from what X X^T would be, the
    more the smaller the singular value, so that it is taken anew after LONGEST steps at most. X and
    R are kept SCALE times too large: that is float16's range, in which this is nearer to float64
    than the iteration on X in bfloat16 is.

    dtype: of the products and the result, None for that of the batch. backend: of the symmetric
    products. S is the smaller of R and C: tall matrices are multiplied from the right, where
    nothing needs to be transposed.
    """
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    exact = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True, dtype=exact)
    scaled_NRC = torch.empty_like(x_NRC, dtype=dtype or x_NRC.dtype)
    torch.mul(x_NRC, SCALE / norm_N11.clamp(min=EPS), out=scaled_NRC)
    x_NRC = scaled_NRC
    *others, last = group_lengths(steps)
    for length in others:
        x_NRC = torch.bmm(*factors(x_NRC, length, tall, backend))
    return torch.baddbmm(x_NRC, *factors(x_NRC, last, tall, backend), beta=0, alpha=1 / SCALE)


def factors(x_NRC: Tensor, steps: int, tall: bool, backend: str) -> tuple[Tensor, Tensor]:
    """What X is after a group of steps, as the two factors of a product: Q and X, or X and Q."""
    a, b, c = COEFFICIENTS
    r_NSS = symmetric_matmul(x_NRC.mT if tall else x_NRC, alpha=1 / SCALE, backend=backend)
    scales = {"alpha": c / SCALE**2, "beta": b / SCALE, "diagonal": a}
    q_NSS = z_NSS = symmetric_matmul(r_NSS, add_NRR=r_NSS, **scales, backend=backend)
    for _ in range(steps - 1):
        for _ in range(2):
            r_NSS = symmetric_matmul(z_NSS, r_NSS, backend=backend)
        z_NSS = symmetric_matmul(r_NSS, add_NRR=r_NSS, **scales, backend=backend)
        q_NSS = symmetric_matmul(z_NSS, q_NSS, backend=backend)
    return (x_NRC, q_NSS) if tall else (q_NSS, x_NRC)


def group_lengths(steps: int) -> list[int]:
    """The steps in groups of at most LONGEST, as even as can be, longer ones first."""
    groups = -(-steps // LONGEST)
    return [steps // groups + (i < steps % groups) for i in range(groups)]


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
    """Of newton_schulz(): of a group of k steps a symmetric product with the long side, 4 k - 3
    without, by halves, and a whole one; bytes of the batch in and out, as if the rest stayed on
    the chip."""
    short, long = sorted((rows, cols))
    gram = symmetric_cost(n, short, long, itemsize=itemsize).flops
    square = symmetric_cost(n, short, short, itemsize=itemsize).flops
    flops = sum(
        gram + (4 * length - 3) * square + 2.0 * n * short * short * long
        for length in group_lengths(steps)
    )
    size = float(n) * rows * cols * itemsize
    return Cost(flops=flops, bytes_read=size, bytes_written=size)
