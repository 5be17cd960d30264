"""Triton kernels of the norms: one forward and one backward for all of them, and a sum of partials.

A row is what one mean is over: W numbers that lie side by side. A program takes ROWS rows at a
time, whole, and walks over the rows in steps of all programs, so that together they sweep memory as
a copy would. What its code is laid out for:

- Bytes bound these kernels: each operand is read once, 16 bytes a thread and load, and what comes
  next is on its way while a tile is worked on: STAGES - 2 tiles a program (Triton asks for a tile
  at the end of a step, so that two stages are no better than one), and several programs on a
  processor.
- Gains stay where they are near (evict_last); rows go by (evict_first). A program reads gains once,
  and, if it has a single tile, after it has asked for the rows: no load waits for another.
- What limits narrow rows with gates is instructions: exp2 and rsqrt are one each, where exp, a
  division and 1 / sqrt take care of numbers that are not normal, which these sums are not.
- Gradients of gains and offsets: a sum over the rows of a program, in its registers, and one line
  of partial sums a program, which norm_sum_kernel adds in order: no atomics, bitwise repeatable.
- Rows of several groups with gains of their own (G > 1): a program works for one of the groups.

p_residual, p_gate, p_bias, p_dy, p_dh and what is written for them may be None.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of gates before their activation, as in reference.py.
GATE_LIMIT = tl.constexpr(1e4)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_offset(i_row, inner, stride_outer, stride_inner):
    """Where rows begin, [ROWS, 1]: rows lie in `inner` steps of one stride and those in another."""
    o_outer = (i_row // inner).to(tl.int64) * stride_outer
    return (o_outer + (i_row % inner).to(tl.int64) * stride_inner)[:, None]


@triton.jit
def read_once(p, mask):
    return tl.load(p, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def read_near(p, o_col, mask, ROWS: tl.constexpr):
    """Gains or offsets, [1, BLOCK]. Those of a single row are read in its shape: a thread has the
    columns that it has of the row, so that none are exchanged."""
    if ROWS == 1:
        o_col, mask = o_col[None, :], mask[None, :]
    b_near = tl.load(p + o_col, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return b_near if ROWS == 1 else b_near[None, :]


@triton.jit
def read_gain(p_weight, o_col, mask, ZERO_CENTERED: tl.constexpr, ROWS: tl.constexpr):
    b_gain = read_near(p_weight, o_col, mask, ROWS)
    if ZERO_CENTERED:
        b_gain += 1.0
    return b_gain


@triton.jit
def add_both(b_a, b_b, b_c, b_d):
    """Of two sums in one walk over the threads."""
    return b_a + b_c, b_b + b_d


@triton.jit
def activation(b_z, SIGMOID: tl.constexpr):
    """(silu(z) or sigmoid(z), its slope), with z clamped."""
    b_in = tl.minimum(tl.maximum(b_z, -GATE_LIMIT), GATE_LIMIT)
    b_root = tl.rsqrt(1 + tl.exp2(b_in * -LOG2_E))
    b_sigmoid = b_root * b_root
    if SIGMOID:
        b_value = b_sigmoid
        b_slope = b_sigmoid * (1 - b_sigmoid)
    else:
        b_value = b_in * b_sigmoid
        b_slope = b_sigmoid * (1 + b_in * (1 - b_sigmoid))
    return b_value, tl.where(b_in == b_z, b_slope, 0.0)


@triton.jit(do_not_specialize=["rows"])
def norm_fwd_kernel(
    # read: rows of x, residual and gate; [G W]
    p_x,
    p_residual,
    p_gate,
    p_weight,
    p_bias,
    # written: rows of y and h, contiguous; if SAVE [rows, G] in float32
    p_y,
    p_h,
    p_mean,
    p_rstd,
    # sizes
    rows,
    inner,
    eps,
    G: tl.constexpr,
    W: tl.constexpr,
    # strides of a row: outer, inner
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    gate_outer,
    gate_inner,
    # options
    CENTERED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    SAVE: tl.constexpr,
    # launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HOLD: tl.constexpr,  # gains are read before the first tile, else for every tile
):
    i_group = tl.program_id(1)
    i_col = tl.arange(0, BLOCK)
    m_col = i_col < W
    o_col = i_group * W + i_col
    if HOLD:
        b_gain = read_gain(p_weight, o_col, m_col, ZERO_CENTERED, ROWS)  # [1, BLOCK]
        if p_bias is not None:
            b_bias = read_near(p_bias, o_col, m_col, ROWS)
    tiles = tl.cdiv(rows, ROWS)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        mask = m_row[:, None] & m_col[None, :]  # [ROWS, BLOCK], as all that follow
        o_out = i_row.to(tl.int64)[:, None] * (G * W) + o_col[None, :]
        b_x = read_once(p_x + row_offset(i_row, inner, x_outer, x_inner) + o_col[None, :], mask)
        if p_residual is not None:
            o_residual = row_offset(i_row, inner, residual_outer, residual_inner)
            b_residual = read_once(p_residual + o_residual + o_col[None, :], mask)
        if p_gate is not None:
            o_gate = row_offset(i_row, inner, gate_outer, gate_inner)
            b_z = read_once(p_gate + o_gate + o_col[None, :], mask)
        if not HOLD:
            b_gain = read_gain(p_weight, o_col, m_col, ZERO_CENTERED, ROWS)
            if p_bias is not None:
                b_bias = read_near(p_bias, o_col, m_col, ROWS)
        if p_residual is not None:
            b_x = b_x + b_residual
            tl.store(p_h + o_out, b_x.to(p_h.dtype.element_ty), mask=mask)  # the norm is of b_x
        if p_gate is not None:
            b_gate, _ = activation(b_z, SIGMOID)
            if GATE_FIRST:
                b_x = b_x * b_gate
        if CENTERED:
            b_mean = tl.sum(b_x, 1) * (1 / W)
            b_x = tl.where(m_col[None, :], b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) * (1 / W) + eps)
        if SAVE:
            o_row = i_row.to(tl.int64) * G + i_group
            tl.store(p_rstd + o_row, b_rstd, mask=m_row)
            if CENTERED:
                tl.store(p_mean + o_row, b_mean, mask=m_row)
        b_y = b_x * b_rstd[:, None] * b_gain
        if p_bias is not None:
            b_y += b_bias
        if p_gate is not None and not GATE_FIRST:
            b_y = b_y * b_gate
        tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_bwd_kernel(
    # read: rows of dy, dh, x (h if there was a residual) and gate; [G W]; [rows, G] in float32
    p_dy,
    p_dh,
    p_x,
    p_gate,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    # written: rows of dx and dgate, contiguous; partial sums [programs, 1 or 2, G W] in float32
    p_dx,
    p_dgate,
    p_partial,
    # sizes
    rows,
    inner,
    G: tl.constexpr,
    W: tl.constexpr,
    # strides of a row: outer, inner
    dy_outer,
    dy_inner,
    dh_outer,
    dh_inner,
    x_outer,
    x_inner,
    gate_outer,
    gate_inner,
    # options
    CENTERED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    # launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SUM_ROWS: tl.constexpr,  # rows of a tile are added at once, else after the last tile
    HOLD: tl.constexpr,  # gains stay in registers, else they are read for every tile
):
    i_group = tl.program_id(1)
    i_col = tl.arange(0, BLOCK)
    m_col = i_col < W
    o_col = i_group * W + i_col
    if HOLD:
        b_gain = read_gain(p_weight, o_col, m_col, ZERO_CENTERED, ROWS)  # [1, BLOCK]
    if p_bias is not None:
        b_bias = read_near(p_bias, o_col, m_col, ROWS)
        b_dbias = tl.zeros((1 if SUM_ROWS else ROWS, BLOCK), tl.float32)
    b_dgain = tl.zeros((1 if SUM_ROWS else ROWS, BLOCK), tl.float32)
    tiles = tl.cdiv(rows, ROWS)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        mask = m_row[:, None] & m_col[None, :]  # [ROWS, BLOCK], as all that follow
        o_out = i_row.to(tl.int64)[:, None] * (G * W) + o_col[None, :]
        b_x = read_once(p_x + row_offset(i_row, inner, x_outer, x_inner) + o_col[None, :], mask)
        b_dy = read_once(p_dy + row_offset(i_row, inner, dy_outer, dy_inner) + o_col[None, :], mask)
        if p_dh is not None:  # read now, so that it is there when dx is
            o_dh = row_offset(i_row, inner, dh_outer, dh_inner)
            b_dh = read_once(p_dh + o_dh + o_col[None, :], mask)
        o_row = i_row.to(tl.int64) * G + i_group
        b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
        if p_gate is not None:
            o_gate = row_offset(i_row, inner, gate_outer, gate_inner)
            b_z = read_once(p_gate + o_gate + o_col[None, :], mask)
            b_gate, b_slope = activation(b_z, SIGMOID)
            if GATE_FIRST:
                b_dz = b_x * b_slope
                b_x = b_x * b_gate
        if CENTERED:
            b_mean = tl.load(p_mean + o_row, mask=m_row, other=0.0)[:, None]
            b_x = tl.where(m_col[None, :], b_x - b_mean, 0.0)
        b_x = b_x * b_rstd  # normalised
        if not HOLD:
            b_gain = read_gain(p_weight, o_col, m_col, ZERO_CENTERED, ROWS)
        if p_gate is not None and not GATE_FIRST:
            b_dz = b_x * b_gain
            if p_bias is not None:
                b_dz += b_bias
            b_dz = b_dz * b_slope * b_dy
            tl.store(p_dgate + o_out, b_dz.to(p_dgate.dtype.element_ty), mask=mask)
            b_dy = b_dy * b_gate
        if SUM_ROWS:
            b_dgain += tl.sum(b_dy * b_x, 0, keep_dims=True)
        else:
            b_dgain += b_dy * b_x
        if p_bias is not None:
            b_dbias += tl.sum(b_dy, 0, keep_dims=True) if SUM_ROWS else b_dy
        b_dx = b_dy * b_gain
        if CENTERED and HOLD:
            b_along, b_common = tl.reduce((b_dx * b_x, b_dx), 1, add_both)
        else:  # of the widest rows pairs would not stay in registers
            b_along = tl.sum(b_dx * b_x, 1)
            b_common = tl.sum(b_dx, 1)
        if CENTERED:
            b_dx = b_dx - b_common[:, None] * (1 / W)
        b_dx = (b_dx - b_x * (b_along[:, None] * (1 / W))) * b_rstd
        if p_gate is not None and GATE_FIRST:
            tl.store(p_dgate + o_out, (b_dx * b_dz).to(p_dgate.dtype.element_ty), mask=mask)
            b_dx = b_dx * b_gate
        if p_dh is not None:
            b_dx += b_dh
        tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=mask)
    SUMS: tl.constexpr = 1 if p_bias is None else 2
    o_partial = tl.program_id(0).to(tl.int64) * (SUMS * G * W) + o_col
    tl.store(p_partial + o_partial, tl.sum(b_dgain, 0), mask=m_col)
    if p_bias is not None:
        tl.store(p_partial + o_partial + G * W, tl.sum(b_dbias, 0), mask=m_col)


@triton.jit(do_not_specialize=["programs"])
def norm_sum_kernel(
    # read: [programs, 1 or 2, D] in float32; written: [D]
    p_partial,
    p_dweight,
    p_dbias,
    # sizes
    programs,
    D: tl.constexpr,
    # launch
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over programs, in order."""
    SUMS: tl.constexpr = 1 if p_dbias is None else 2
    i_sum = tl.program_id(1)
    i_col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(0, programs, ROWS):
        i_program = first + tl.arange(0, ROWS)
        mask = (i_program < programs)[:, None] & (i_col < D)[None, :]
        o_partial = i_program.to(tl.int64)[:, None] * (SUMS * D) + i_sum * D + i_col[None, :]
        b_sum += tl.load(p_partial + o_partial, mask=mask, other=0.0)
    b_total = tl.sum(b_sum, 0)
    if i_sum == 0:
        tl.store(p_dweight + i_col, b_total.to(p_dweight.dtype.element_ty), mask=i_col < D)
    elif p_dbias is not None:
        tl.store(p_dbias + i_col, b_total.to(p_dbias.dtype.element_ty), mask=i_col < D)
