"""linear_cross_entropy(): the projection to the vocabulary and the losses of its logits."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.checks import check_backend
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.linear_cross_entropy.chunked import chunked
from llmtrain_kernels.linear_cross_entropy.chunks import logits_limit, rows_per_chunk
from llmtrain_kernels.linear_cross_entropy.reference import IGNORED, HeadLoss, reference

BACKENDS = ("triton", "chunked", "reference")
NAME = "linear_cross_entropy"


def linear_cross_entropy(
    x_ND: Tensor,
    weight_OD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    expected_gradient: float = 1.0,
    wide_sum: bool = True,
    backend: str = "auto",
) -> HeadLoss:
    """(loss, ce_sum, lse_square_sum); gradients of the loss for x and the weight.

    x_ND: hidden vectors; products are in their dtype. weight_OD: any floating dtype. targets_N:
    integers; one outside of [0, vocab_size) makes the loss nan, ignore_index counts nothing.
    weights_N: constants, None is 1. vocab_size: rows of the weight that are tokens, None is all;
    the others get no probability and no gradient. chunk_rows: rows at a time, None is as many as
    256 MiB of logits hold, or half the bytes of a float32 weight if that is more.
    expected_gradient: the gradient of the loss that the backward pass will be given, as far as
    known: another one costs a pass over the gradients. wide_sum: add a weight's gradient up in
    float32; False: in the weight's dtype, without the float32 copy that a weight of lower precision
    else needs.
    backend: auto | triton | chunked | reference; auto is triton on CUDA where it can run, else
    chunked. ValueError for arguments that do not fit together, or a backend that cannot run.
    """
    check(x_ND, weight_OD, targets_N, weights_N, softcap, vocab_size, chunk_rows, backend)
    if expected_gradient == 0 or x_ND.dtype == torch.float16:  # float16 has no range for it
        expected_gradient = 1.0
    chosen = select_backend(backend, x_ND.device.type, x_ND.dtype, weight_OD.dtype)
    options = {"z_loss": z_loss, "softcap": softcap, "ignore_index": ignore_index}
    vocab_size = index(weight_OD.shape[0]) if vocab_size is None else vocab_size
    if chosen == "reference":
        return reference(x_ND, weight_OD, targets_N, weights_N, vocab_size=vocab_size, **options)
    rows, columns = index(x_ND.shape[0]), index(weight_OD.shape[0])
    if chunk_rows is None:
        limit = logits_limit(columns, index(x_ND.shape[1]), weight_OD.dtype.itemsize)
        chunk_rows = rows_per_chunk(rows, columns, x_ND.dtype.itemsize, limit)
    return chunked(
        x_ND,
        weight_OD,
        targets_N,
        weights_N,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        expected_gradient=expected_gradient,
        wide_sum=wide_sum,
        fused=chosen == "triton",
        **options,
    )


@torch.compiler.assume_constant_result
def select_backend(
    requested: str, device: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> str:
    """The backend that runs. Plain values in and out: under torch.compile it runs while tracing.
    ValueError when the requested one cannot run."""
    why_not = triton_backend.unavailable(device, dtype, weight_dtype)
    return triton_backend.select(NAME, requested, device, why_not, "chunked")


def check(
    x_ND: Tensor,
    weight_OD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    backend: str,
) -> None:
    """ValueError when the arguments of linear_cross_entropy() do not fit together."""
    check_backend(NAME, backend, BACKENDS)
    if x_ND.dim() != 2 or weight_OD.dim() != 2 or x_ND.shape[1] != weight_OD.shape[1]:
        raise ValueError(
            f"{NAME}: got x {tuple(x_ND.shape)} and weight {tuple(weight_OD.shape)}, expected "
            "[N, D] and [O, D]; flatten rows and tokens, and give the weight as nn.Linear has it"
        )
    rows = x_ND.shape[:1]
    if targets_N.shape != rows or (weights_N is not None and weights_N.shape != rows):
        weights = "none" if weights_N is None else tuple(weights_N.shape)
        raise ValueError(
            f"{NAME}: got targets {tuple(targets_N.shape)} and weights {weights} for x "
            f"{tuple(x_ND.shape)}, expected one of each a row of x; flatten them alike"
        )
    if vocab_size is not None and not 1 <= vocab_size <= weight_OD.shape[0]:
        raise ValueError(
            f"{NAME}: got vocab_size={vocab_size} for a weight of {weight_OD.shape[0]} rows, "
            "expected at least 1 and no more than these; set vocab_size to the tokens' number"
        )
    for name, value in (("softcap", softcap), ("chunk_rows", chunk_rows)):
        if value is not None and value <= 0:
            raise ValueError(f"{NAME}: got {name}={value}, expected > 0 or None; set {name}")


def cost(
    rows: int, *, width: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Cost, Cost]:
    """(forward, backward) of N rows, D wide, with O columns. The backward pass's products are done
    in the forward pass, from logits that are there; saved are the gradients."""
    x_bytes = rows * width * dtype.itemsize
    weight_bytes = columns * width * weight_dtype.itemsize
    row_bytes = rows * (8 + 4)  # targets and weights
    forward = Cost(
        flops=2.0 * rows * width * columns,
        bytes_read=x_bytes + weight_bytes + row_bytes,
        bytes_written=12,
        saved_bytes=x_bytes + weight_bytes,
    )
    backward = Cost(
        flops=2 * forward.flops,
        bytes_read=forward.bytes_read,
        bytes_written=x_bytes + weight_bytes,
    )
    return forward, backward
