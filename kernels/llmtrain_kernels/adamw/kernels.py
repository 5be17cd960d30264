"""The two Triton kernels. Every element is read once and written once.

A program has BLOCK elements of one tensor, or none of them when the step is skipped. Bias
corrections come from the step counter on the device, in float64, as 1 - beta^t cancels; the moments
move by their distance to the new value, so that a rounded beta never becomes another average.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find(p_first, i_block, WIDTH: tl.constexpr):
    """(Number of the tensor that a block is of, number of the block in it)."""
    b_first = tl.load(p_first + tl.arange(0, WIDTH))
    i_tensor = tl.sum((b_first <= i_block).to(tl.int32), axis=0) - 1
    return i_tensor, i_block - tl.load(p_first + i_tensor)


@triton.jit
def address(p_row, i_tensor, like, ALIGNED: tl.constexpr):
    """An entry of the table as a pointer."""
    p = tl.load(p_row + i_tensor).to(like)
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def length(p_row, i_tensor, ALIGNED: tl.constexpr):
    """An entry of the table as a number of elements."""
    size = tl.load(p_row + i_tensor)
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def average(b_old, b_new, WEIGHT: tl.constexpr):
    """From the nearer end, so that weights of 0 and 1 are exact."""
    if WEIGHT < 0.5:
        return b_old + (b_new - b_old) * WEIGHT
    else:
        return b_new - (b_new - b_old) * (1.0 - WEIGHT)


@triton.jit
def update(
    p_p,
    p_g,
    p_m,
    p_v,
    p_copy,
    p_step,
    p_scale,
    o,  # [BLOCK]
    mask,  # [BLOCK]
    lr,
    decay,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    NEW1: tl.constexpr,
    NEW2: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    COPY: tl.constexpr,
):
    """NEW1, NEW2: 1 - beta; decay: lr * weight decay."""
    b_g = tl.load(p_g + o, mask=mask, other=0.0, eviction_policy="evict_first")
    b_m = tl.load(p_m + o, mask=mask, other=0.0, eviction_policy="evict_first")
    b_v = tl.load(p_v + o, mask=mask, other=0.0, eviction_policy="evict_first")
    b_p = tl.load(p_p + o, mask=mask, other=0.0, eviction_policy="evict_first")
    step = tl.load(p_step).to(tl.float64)
    rate = (lr / (1.0 - tl.exp(step * LOG_BETA1))).to(tl.float32)
    grow = tl.sqrt(1.0 / (1.0 - tl.exp(step * LOG_BETA2))).to(tl.float32)
    if SCALED:
        b_g = tl.div_rn(b_g, tl.load(p_scale) + tl.zeros_like(b_g))
    b_m = average(b_m, b_g, NEW1)
    b_v = average(b_v, b_g * b_g, NEW2)
    b_p -= decay * b_p
    b_p -= tl.div_rn(rate * b_m, tl.sqrt_rn(b_v) * grow + EPS)
    tl.store(p_m + o, b_m, mask=mask, eviction_policy="evict_first")
    tl.store(p_v + o, b_v, mask=mask, eviction_policy="evict_first")
    tl.store(p_p + o, b_p, mask=mask, eviction_policy="evict_first")
    if COPY:
        tl.store(p_copy + o, b_p.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["lr", "decay"])
def adamw_flat_kernel(
    # read and written: [size]; p_copy: written, bfloat16
    p_p,
    p_g,
    p_m,
    p_v,
    p_copy,
    # read: scalars
    p_step,
    p_scale,
    p_skip,
    # sizes
    size,
    # options
    lr,
    decay,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    NEW1: tl.constexpr,
    NEW2: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if SKIPS:  # noqa: SIM102 - a branch of the compiler's, then one of the device's
        if tl.load(p_skip) == 1.0:
            return
    update(
        p_p,
        p_g,
        p_m,
        p_v,
        p_copy,
        p_step,
        p_scale,
        o,
        o < size,
        lr,
        decay,
        LOG_BETA1,
        LOG_BETA2,
        NEW1,
        NEW2,
        EPS,
        SCALED,
        COPY,
    )


@triton.jit(do_not_specialize=["lr", "decay"])
def adamw_list_kernel(
    # read: int64 [8, WIDTH]: addresses of p, g, m, v, copy and step, sizes, first blocks
    p_table,
    # read: scalars
    p_scale,
    p_skip,
    # options
    lr,
    decay,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    NEW1: tl.constexpr,
    NEW2: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPS: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if SKIPS:  # noqa: SIM102 - a branch of the compiler's, then one of the device's
        if tl.load(p_skip) == 1.0:
            return
    single = tl.pointer_type(tl.float32)
    i_tensor, i_block = find(p_table + 7 * WIDTH, tl.program_id(0), WIDTH)
    size = length(p_table + 6 * WIDTH, i_tensor, ALIGNED)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    update(
        address(p_table, i_tensor, single, ALIGNED),
        address(p_table + WIDTH, i_tensor, single, ALIGNED),
        address(p_table + 2 * WIDTH, i_tensor, single, ALIGNED),
        address(p_table + 3 * WIDTH, i_tensor, single, ALIGNED),
        address(p_table + 4 * WIDTH, i_tensor, tl.pointer_type(tl.bfloat16), ALIGNED),
        address(p_table + 5 * WIDTH, i_tensor, single, False),
        p_scale,
        o,
        o < size,
        lr,
        decay,
        LOG_BETA1,
        LOG_BETA2,
        NEW1,
        NEW2,
        EPS,
        SCALED,
        COPY,
    )


@triton.jit
def squares_flat_kernel(p_x, p_partial, size, BLOCK: tl.constexpr):
    """A sum for each block, read in the order of memory. x: [size]; partial: float32 [blocks]."""
    i_block = tl.program_id(0)
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(p_partial + i_block, tl.sum(b_x * b_x, axis=0))


@triton.jit
def squares_list_kernel(
    # read: int64 [3, WIDTH]: addresses, sizes, first blocks
    p_table,
    # written: float32 [blocks]
    p_partial,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tensor, i_block = find(p_table + 2 * WIDTH, tl.program_id(0), WIDTH)
    size = length(p_table + WIDTH, i_tensor, ALIGNED)
    p_x = address(p_table, i_tensor, tl.pointer_type(tl.float32), ALIGNED)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < size, other=0.0)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_x * b_x, axis=0))
