"""The Triton kernel of float8: one read, two layouts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cast_both_kernel(
    # read: [M, K], a float32
    p_x,
    p_amax,
    # written: float8 [M, K] and [K, M]
    p_rows,
    p_columns,
    # sizes; the largest value of the float8 dtype
    M,
    K,
    largest,
    # launch
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a tile. What is not a number stays so: minima and maxima would hide it."""
    scale = largest / tl.load(p_amax)
    i_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (i_m < M)[:, None] & (i_k < K)[None, :]  # [ROWS, COLUMNS]
    o_m, o_k = i_m.to(tl.int64), i_k.to(tl.int64)
    b_x = tl.load(p_x + o_m[:, None] * K + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    b_x = b_x * scale
    b_x = tl.where(b_x > largest, largest, b_x)
    b_x = tl.where(b_x < -largest, -largest, b_x)
    b_x = b_x.to(p_rows.dtype.element_ty)
    tl.store(p_rows + o_m[:, None] * K + o_k[None, :], b_x, mask=mask)
    o_columns = o_k[:, None] * M + o_m[None, :]
    tl.store(p_columns + o_columns, tl.trans(b_x), mask=tl.trans(mask))
