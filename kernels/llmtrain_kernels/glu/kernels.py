"""Triton kernels of the gated linear units: a program makes ROWS x BLOCK results.

Nothing is shared between programs, so that what limits them is memory alone: a thread has 16 bytes
of each operand on their way, and neither kernel uses shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

SATURATED = tl.constexpr(16.0)  # beyond it gelu_tanh is 0 or g in float32; g^3 stays finite
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def activation_and_slope(b_g, ACTIVATION: tl.constexpr, SLOPE_TOO: tl.constexpr):
    """(act(g), its derivative or 0), of float32."""
    b_slope = 0.0
    if ACTIVATION == "silu":
        b_s = tl.sigmoid(b_g)
        b_a = b_g * b_s
        if SLOPE_TOO:
            b_slope = b_s + b_a * (1 - b_s)
    elif ACTIVATION == "gelu":
        b_cdf = 0.5 + 0.5 * tl.erf(b_g * INVERSE_SQRT_2)
        b_a = b_g * b_cdf
        if SLOPE_TOO:
            b_n = tl.minimum(tl.maximum(b_g, -SATURATED), SATURATED)
            b_slope = b_cdf + b_n * tl.exp(b_n * b_n * -0.5) * NORMAL
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        b_n = tl.minimum(tl.maximum(b_g, -SATURATED), SATURATED)
        b_square = b_n * b_n * CUBIC
        b_s = tl.sigmoid(b_n * (1 + b_square) * SLOPE)
        b_a = b_g * b_s
        if SLOPE_TOO:
            b_slope = b_s + b_n * b_s * (1 - b_s) * (1 + b_square * 3) * SLOPE
    return b_a, b_slope


@triton.jit
def tile(X, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(row [ROWS, 1] int64, column [1, BLOCK], which of them are there) of this program."""
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    i_program = tl.program_id(0)
    i_row = (i_program // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_col = i_program % BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]
    return i_row, o_col, (i_row < X) & (o_col < F)


@triton.jit(do_not_specialize=["X"])
def glu_fwd_kernel(
    # read: [X, 2F]; written: [X, F]
    p_gate_up,
    p_y,
    # sizes, and the stride of a packed row
    X,
    stride,
    F: tl.constexpr,
    # options
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, o_col, mask = tile(X, F, ROWS, BLOCK)
    p_gate = p_gate_up + i_row * stride + o_col  # [ROWS, BLOCK], as all that follow
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=mask, other=0.0).to(tl.float32)
    b_a, _ = activation_and_slope(b_gate, ACTIVATION, False)
    tl.store(p_y + i_row * F + o_col, (b_a * b_up).to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["X"])
def glu_bwd_kernel(
    # read: [X, F], [X, 2F]; written: [X, 2F]
    p_dy,
    p_gate_up,
    p_dgate_up,
    # sizes, and the strides of a row of dy and of a packed one
    X,
    dy_stride,
    stride,
    F: tl.constexpr,
    # options
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row, o_col, mask = tile(X, F, ROWS, BLOCK)
    p_gate = p_gate_up + i_row * stride + o_col  # [ROWS, BLOCK], as all that follow
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=mask, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy + i_row * dy_stride + o_col, mask=mask, other=0.0).to(tl.float32)
    b_a, b_slope = activation_and_slope(b_gate, ACTIVATION, True)
    dtype = p_dgate_up.dtype.element_ty
    p_dgate = p_dgate_up + i_row * 2 * F + o_col
    tl.store(p_dgate, (b_dy * b_up * b_slope).to(dtype), mask=mask)
    tl.store(p_dgate + F, (b_dy * b_a).to(dtype), mask=mask)
