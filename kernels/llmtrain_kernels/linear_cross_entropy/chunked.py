"""The operation in chunks of rows: by the Triton kernel, or the same algorithm in torch.

Saved for the backward pass: dx in x's dtype and dW in the weight's, no input. Nothing depends on
values: no synchronisation, the same allocations every time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmtrain_kernels import launch
from llmtrain_kernels.linear_cross_entropy.chunks import parts_of_sum, row_stride
from llmtrain_kernels.linear_cross_entropy.reference import HeadLoss

LANE_ELEMENTS = 8  # that a thread reads at a time
PROGRAMS = 1056  # of the backward kernel: 8 for each of 132 processors


@torch.library.custom_op("llmtrain::linear_cross_entropy", mutates_args=())
def forward(
    x_ND: Tensor,
    weight_OD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    expected: float,
    wide_sum: bool,
    need_dx: bool,
    need_dw: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, sums [2] of w ce and w lse^2, dx, dW); gradients that are not needed are empty.

    expected: what the gradient of the loss will be. wide_sum: add dW up in float32, also for a
    weight of lower precision. fused: rows by the Triton kernel.
    """
    rows, columns = x_ND.shape[0], weight_OD.shape[0]
    need = need_dx or need_dw
    loss, sums_2, dx_ND, dw_OD = outputs(x_ND, weight_OD, need_dx, need_dw)
    low_OD = weight_OD.to(x_ND.dtype)
    sum_OD = dw_OD
    if need_dw and wide_sum and rows > chunk_rows and dw_OD.dtype.itemsize < 4:
        sum_OD = torch.empty_like(dw_OD, dtype=torch.float32)
    rows_2N = sums_2.new_empty(2, rows)
    buffer_CS = x_ND.new_empty(min(chunk_rows, rows), row_stride(columns))
    row_step = rows_by_triton if fused else rows_by_torch
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, rows))
        x_CD, logits_CS = x_ND[chunk], buffer_CS[: chunk.stop - start]
        logits_CO = logits_CS[:, :columns]
        torch.mm(x_CD, low_OD.T, out=logits_CO)
        row_step(
            logits_CS,
            targets_N[chunk],
            None if weights_N is None else weights_N[chunk],
            rows_2N[:, chunk],
            z_loss=z_loss,
            softcap=softcap,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            expected=expected if need else None,
        )
        if need_dx:
            product(dx_ND[chunk], logits_CO, low_OD)
        if need_dw:
            accumulate(sum_OD, logits_CO.T, x_CD, first=start == 0)
    if sum_OD is not dw_OD:
        dw_OD.copy_(sum_OD)
    if rows == 0:
        dw_OD.zero_()
    torch.sum(rows_2N, 1, out=sums_2)
    torch.add(sums_2[0], sums_2[1], alpha=z_loss, out=loss) if z_loss else loss.copy_(sums_2[0])
    return loss, sums_2, dx_ND, dw_OD


def outputs(
    x_ND: Tensor, weight_OD: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return (
        x_ND.new_empty((), dtype=wide),
        x_ND.new_empty(2, dtype=wide),
        x_ND.new_empty(x_ND.shape if need_dx else (0,)),
        weight_OD.new_empty(weight_OD.shape if need_dw else (0,)),
    )


@forward.register_fake
def _(
    x_ND,
    weight_OD,
    targets_N,
    weights_N,
    z_loss,
    softcap,
    ignore_index,
    vocab_size,
    chunk_rows,
    expected,
    wide_sum,
    need_dx,
    need_dw,
    fused,
):
    return outputs(x_ND, weight_OD, need_dx, need_dw)


def product(out_CD: Tensor, d_CO: Tensor, low_OD: Tensor) -> None:
    """out = d W. On a GPU in parts of the sum where few tiles would leave processors idle; they are
    added in float32, as the library's own cut need not be."""
    parts = 1
    if d_CO.is_cuda and d_CO.dtype.itemsize < 4:
        parts = parts_of_sum(*out_CD.shape, d_CO.shape[1], processors(d_CO.device))
    if parts == 1:
        torch.mm(d_CO, low_OD, out=out_CD)
    else:
        out_CD.copy_(product_in_parts(d_CO, low_OD, parts))


def product_in_parts(d_CO: Tensor, low_OD: Tensor, parts: int) -> Tensor:
    """d W in float32. parts divide the columns."""
    d_PCK = d_CO.unflatten(1, (parts, -1)).transpose(0, 1)
    low_PKD = low_OD.unflatten(0, (parts, -1))
    if d_CO.is_cuda:
        return torch.bmm(d_PCK, low_PKD, out_dtype=torch.float32).sum(0)
    return torch.bmm(d_PCK.float(), low_PKD.float()).sum(0)


def accumulate(sum_OD: Tensor, d_OC: Tensor, x_CD: Tensor, *, first: bool) -> None:
    """sum += d x, or = when it is the first; in the sum's dtype."""
    if sum_OD.dtype == x_CD.dtype:
        torch.addmm(sum_OD, d_OC, x_CD, beta=0 if first else 1, out=sum_OD)
    elif x_CD.is_cuda and sum_OD.dtype == torch.float32 and x_CD.dtype.itemsize < 4:
        if first:
            torch.ops.aten.mm.dtype_out(d_OC, x_CD, torch.float32, out=sum_OD)
        else:
            torch.ops.aten.addmm.dtype_out(sum_OD, d_OC, x_CD, torch.float32, out=sum_OD)
    else:
        made_OD = torch.mm(d_OC.to(sum_OD.dtype), x_CD.to(sum_OD.dtype))
        sum_OD.copy_(made_OD) if first else sum_OD.add_(made_OD)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_by_triton(
    logits_CS: Tensor,
    targets_C: Tensor,
    weights_C: Tensor | None,
    sums_2C: Tensor,
    *,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    expected: float | None,
    config: dict[str, int] | None = None,
) -> None:
    """Fill sums_2C with w ce and w lse^2 of every row; unless expected is None, turn logits into
    expected x d logits in place. config: block, stages, num_warps; None: the pinned ones."""
    from llmtrain_kernels.linear_cross_entropy.kernels import linear_cross_entropy_fwd_kernel

    assert logits_CS.stride(1) == targets_C.stride(0) == sums_2C.stride(1) == 1
    assert weights_C is None or (weights_C.stride(0) == 1 and weights_C.dtype == torch.float32)
    if logits_CS.shape[0] == 0:
        return
    if config is None:
        config = launch.launch("linear_cross_entropy_fwd", logits_CS.device, vocab_size)
    lanes = min(32 * config["num_warps"] * LANE_ELEMENTS, config["block"])
    with torch.cuda.device_of(logits_CS):
        linear_cross_entropy_fwd_kernel[(logits_CS.shape[0],)](
            logits_CS,
            targets_C,
            weights_C,
            sums_2C,
            vocab_size,
            logits_CS.stride(0),
            sums_2C.stride(0),
            ignore_index,
            z_loss,
            softcap or 1.0,
            1.0 if expected is None else expected,
            WEIGHTED=weights_C is not None,
            CAPPED=softcap is not None,
            GRADIENT=expected is not None,
            SUB=config["block"] // lanes,
            LANES=lanes,
            STAGES=config["stages"],
            num_warps=config["num_warps"],
        )


def rows_by_torch(
    logits_CS: Tensor,
    targets_C: Tensor,
    weights_C: Tensor | None,
    sums_2C: Tensor,
    *,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    expected: float | None,
) -> None:
    """The same in torch, in float32 at least."""
    logits_CV = logits_CS[:, :vocab_size].to(sums_2C.dtype)
    if softcap is not None:
        bent_CV = torch.tanh(logits_CV / softcap)
        logits_CV = softcap * bent_CV
    lse_C = logits_CV.logsumexp(dim=1)
    weights_C = torch.ones_like(lse_C) if weights_C is None else weights_C.to(lse_C.dtype)
    counts_C = (targets_C != ignore_index) & (weights_C != 0)
    known_C = (targets_C >= 0) & (targets_C < vocab_size)
    targets_C1 = torch.where(known_C, targets_C, 0)[:, None]
    picked_C = torch.where(known_C, logits_CV.gather(1, targets_C1)[:, 0], torch.nan)
    sums_2C[0] = torch.where(counts_C, weights_C * (lse_C - picked_C), 0)
    sums_2C[1] = torch.where(counts_C, weights_C * lse_C.square(), 0)
    if expected is None:
        return
    scale_C1 = (weights_C * expected)[:, None]
    d_CV = torch.exp(logits_CV - lse_C[:, None])
    d_CV *= scale_C1 * (1 + 2 * z_loss * lse_C[:, None])
    d_CV.scatter_add_(1, targets_C1, torch.where(known_C[:, None], -scale_C1, 0))
    if softcap is not None:
        d_CV *= 1 - bent_CV.square()
    d_CV.masked_fill_(~counts_C[:, None], 0)
    logits_CS[:, :vocab_size] = d_CV
    logits_CS[:, vocab_size:] = 0


@torch.library.custom_op("llmtrain::linear_cross_entropy_scale", mutates_args=("dx_ND", "dw_OD"))
def scale(dx_ND: Tensor, dw_OD: Tensor, dloss: Tensor, expected: float) -> None:
    """Multiply both in place by dloss / expected, which is read on the device."""
    scale_by_triton(dx_ND, dloss, expected)
    scale_by_triton(dw_OD, dloss, expected)


@scale.register_fake
def _(dx_ND, dw_OD, dloss, expected):
    return None


def scale_by_triton(
    gradient: Tensor, dloss: Tensor, expected: float, *, config: dict[str, int] | None = None
) -> None:
    """config: block, num_warps; None: the pinned ones."""
    from llmtrain_kernels.linear_cross_entropy.kernels import linear_cross_entropy_bwd_kernel

    assert gradient.is_contiguous()
    size = gradient.numel()
    if size == 0:
        return
    if config is None:
        config = launch.launch("linear_cross_entropy_bwd", gradient.device, size)
    programs = min(PROGRAMS, -(-size // config["block"]))
    with torch.cuda.device_of(gradient):
        linear_cross_entropy_bwd_kernel[(programs,)](
            gradient,
            dloss,
            size,
            expected,
            PROGRAMS=programs,
            BLOCK=config["block"],
            num_warps=config["num_warps"],
        )


def setup_context(ctx, inputs, output) -> None:
    expected, need_dx, need_dw, fused = inputs[9], *inputs[11:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.expected, ctx.need, ctx.fused = expected, (need_dx, need_dw), fused


def gradients(ctx, dloss, *_):
    """Of forward(). A second backward pass over one graph is an error of autograd's: the first has
    changed what is kept."""
    constants = (None,) * 12
    if dloss is None:
        return None, None, *constants
    kept = [z.detach() for z in ctx.saved_tensors]
    if ctx.fused:
        scale(*kept, dloss, ctx.expected)
    else:
        kept = [z * (dloss / ctx.expected) for z in kept]
    return *(z if need else None for z, need in zip(kept, ctx.need)), *constants


forward.register_autograd(gradients, setup_context=setup_context)


def chunked(
    x_ND: Tensor,
    weight_OD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    z_loss: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int,
    expected_gradient: float,
    wide_sum: bool,
    fused: bool,
) -> HeadLoss:
    """Arguments as linear_cross_entropy(), none left out. fused: rows by the Triton kernel."""
    if weights_N is not None:
        weights_N = weights_N.detach()
        weights_N = weights_N.float().contiguous() if fused else weights_N
    wanted = torch.is_grad_enabled()
    loss, sums_2, _, _ = forward(
        x_ND.contiguous(),
        weight_OD.contiguous(),
        targets_N.contiguous(),
        weights_N,
        float(z_loss),
        softcap,
        ignore_index,
        vocab_size,
        chunk_rows,
        float(expected_gradient),
        wide_sum,
        wanted and x_ND.requires_grad,
        wanted and weight_OD.requires_grad,
        fused,
    )
    ce_sum, lse_square_sum = sums_2.detach().unbind()
    return HeadLoss(loss, ce_sum, lse_square_sum)
