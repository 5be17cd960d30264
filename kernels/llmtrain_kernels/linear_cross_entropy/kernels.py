"""The Triton kernels of linear_cross_entropy.

Forward: a program a row of logits. It reads the row once for the log-sum-exp, each lane for itself
(no exchange between threads before the row's end), then again from its end to its beginning, and
writes the gradient in its place: what was read last is the likeliest to be still in a cache. So of
three passes two go to memory where as many rows as run at once fit the second-level cache: rows of
256 KB need one program a processor.

Backward: multiplies the kept gradients by the gradient of the loss over the expected one, or ends
at once when that is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1e30)  # below all logits, and finite, so that no difference is nan
SAME = tl.constexpr(5e-7)  # relative: four roundings of float32


@triton.jit
def tanh(b_x):
    """1 - 2 / (1 + e^2x), within 1e-7; right at both ends."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(b_x * (2.0 * LOG2E)))


@triton.jit
def offsets(start, SUB: tl.constexpr, LANES: tl.constexpr):
    i_sub = tl.arange(0, SUB)[:, None]
    return start + i_sub * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def linear_cross_entropy_fwd_kernel(
    # pointers; logits [rows, stride], sums [2, rows of all chunks]
    p_logits,
    p_targets,
    p_weights,
    p_sums,
    # sizes: columns that count, elements from a row to the next, from the first sum to the second
    vocab,
    stride,
    sums_stride,
    # numbers
    ignore_index,
    z_loss,
    softcap,
    expected,
    # constants
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUB: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """w ce and w lse^2 of a row; with GRADIENT the row becomes expected x its gradient, all
    `stride` columns of it, zero where no column counts."""
    STEP: tl.constexpr = SUB * LANES
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride
    target = tl.load(p_targets + i_row)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(p_weights + i_row)
    if (target != ignore_index) & (weight != 0.0):
        known = (target >= 0) & (target < vocab)
        label = tl.where(known, target, -1).to(tl.int32)
        # before the row is overwritten
        picked = tl.load(p_row + tl.maximum(label, 0)).to(tl.float32)
        if CAPPED:
            picked = softcap * tanh(picked / softcap)

        b_max = tl.full([LANES], LEAST, tl.float32)
        b_sum = tl.zeros([LANES], tl.float32)
        for start in tl.range(0, stride, STEP, num_stages=STAGES):
            b_o = offsets(start, SUB, LANES)  # [SUB, LANES]
            b_x = tl.load(p_row + b_o, mask=b_o < stride, other=0.0).to(tl.float32)
            if CAPPED:
                b_x = softcap * tanh(b_x / softcap)
            b_x = tl.where(b_o < vocab, b_x, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_x, 0))
            # the difference first: b_x * LOG2E - b_new * LOG2E would be fused, and then one product
            # is rounded and the other is not, which at 1e30 is off by 1e22
            b_sum *= tl.exp2((b_max - b_new) * LOG2E)
            b_sum += tl.sum(tl.exp2((b_x - b_new[None, :]) * LOG2E), 0)
            b_max = b_new
        most = tl.max(b_max, 0)
        sum_2 = tl.log2(tl.sum(b_sum * tl.exp2((b_max - most) * LOG2E), 0))
        lse = most + sum_2 * LN2

        ce = tl.where(known, (most - picked) + sum_2 * LN2, float("nan"))
        tl.store(p_sums + i_row, weight * ce)
        tl.store(p_sums + sums_stride + i_row, weight * lse * lse)
        if GRADIENT:
            scale = weight * expected
            scale_p = scale * (1.0 + 2.0 * z_loss * lse)
            blocks = tl.cdiv(stride, STEP)
            for k in tl.range(0, blocks, num_stages=STAGES):
                b_o = offsets((blocks - 1 - k) * STEP, SUB, LANES)  # [SUB, LANES]
                b_x = tl.load(p_row + b_o, mask=b_o < stride, other=0.0).to(tl.float32)
                if CAPPED:
                    b_t = tanh(b_x / softcap)
                    b_x = softcap * b_t
                b_d = scale_p * tl.exp2((b_x - most) * LOG2E - sum_2)
                b_d -= tl.where(b_o == label, scale, 0.0)
                if CAPPED:
                    b_d *= 1.0 - b_t * b_t
                b_d = tl.where(b_o < vocab, b_d, 0.0)
                tl.store(p_row + b_o, b_d.to(p_logits.dtype.element_ty), mask=b_o < stride)
    else:
        tl.store(p_sums + i_row, 0.0)
        tl.store(p_sums + sums_stride + i_row, 0.0)
        if GRADIENT:
            b_zero = tl.zeros([SUB, LANES], p_logits.dtype.element_ty)
            for start in tl.range(0, stride, STEP):
                b_o = offsets(start, SUB, LANES)
                tl.store(p_row + b_o, b_zero, mask=b_o < stride)


@triton.jit
def linear_cross_entropy_bwd_kernel(
    p_gradient, p_upstream, size, expected, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    """gradient *= upstream / expected, where that is not 1. size: of the gradient, elements."""
    factor = tl.load(p_upstream).to(tl.float32) / expected
    if tl.abs(factor - 1.0) > SAME or factor != factor:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < size:
            b_o = start + tl.arange(0, BLOCK)  # [BLOCK]
            b_y = tl.load(p_gradient + b_o, mask=b_o < size, other=0.0).to(tl.float32)
            b_y *= factor
            tl.store(p_gradient + b_o, b_y.to(p_gradient.dtype.element_ty), mask=b_o < size)
            start += PROGRAMS * BLOCK
