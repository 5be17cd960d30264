"""The Triton kernels of Muon: momentum and update in one pass, weights in one pass, and symmetric
products, of which the tiles below the diagonal are computed and written twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llmtrain_kernels.adamw.kernels import address, average, find, length

KINDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def momentum_kernel(
    # read: int64 [5, WIDTH]: addresses of gradients, momenta and updates, sizes, first blocks
    p_table,
    # read: scalars
    p_scale,
    p_skip,
    # options
    NEW: tl.constexpr,
    NESTEROV: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPS: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NEW: 1 - momentum; KIND: of the updates."""
    i_tensor, i_block = find(p_table + 4 * WIDTH, tl.program_id(0), WIDTH)
    size = length(p_table + 3 * WIDTH, i_tensor, ALIGNED)
    single = tl.pointer_type(tl.float32)
    p_g = address(p_table, i_tensor, single, ALIGNED)
    p_m = address(p_table + WIDTH, i_tensor, single, ALIGNED)
    p_u = address(p_table + 2 * WIDTH, i_tensor, tl.pointer_type(KIND), ALIGNED)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    if SKIPS:  # noqa: SIM102 - a branch of the compiler's, then one of the device's
        if tl.load(p_skip) > 0.0:
            tl.store(p_u + o, tl.zeros((BLOCK,), KIND), mask=mask)
            return
    b_g = tl.load(p_g + o, mask=mask, other=0.0, eviction_policy="evict_first")
    b_m = tl.load(p_m + o, mask=mask, other=0.0, eviction_policy="evict_first")
    if SCALED:
        b_g = tl.div_rn(b_g, tl.load(p_scale) + tl.zeros_like(b_g))
    b_m = average(b_m, b_g, NEW)
    tl.store(p_m + o, b_m, mask=mask, eviction_policy="evict_first")
    b_u = average(b_m, b_g, NEW) if NESTEROV else b_m
    tl.store(p_u + o, b_u.to(KIND), mask=mask)


@triton.jit(do_not_specialize=["rate", "decay"])
def apply_kernel(
    # read: int64 [4, WIDTH]: addresses of parameters and updates, sizes, first blocks
    p_table,
    # read: scalar
    p_skip,
    # options
    rate,
    decay,
    SKIPS: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """KIND: of the updates."""
    if SKIPS:  # noqa: SIM102 - a branch of the compiler's, then one of the device's
        if tl.load(p_skip) > 0.0:
            return
    i_tensor, i_block = find(p_table + 3 * WIDTH, tl.program_id(0), WIDTH)
    size = length(p_table + 2 * WIDTH, i_tensor, ALIGNED)
    p_p = address(p_table, i_tensor, tl.pointer_type(tl.float32), ALIGNED)
    p_u = address(p_table + WIDTH, i_tensor, tl.pointer_type(KIND), ALIGNED)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_p = tl.load(p_p + o, mask=mask, other=0.0, eviction_policy="evict_first")
    b_u = tl.load(p_u + o, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b_p -= decay * b_p
    b_p -= rate * b_u
    tl.store(p_p + o, b_p, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["alpha", "beta", "diagonal"])
def symmetric_matmul_kernel(
    # read: two [N, R, C] in any strides, symmetric [N, R, R]; written: [N, R, R]
    p_x,
    p_other,
    p_add,
    p_y,
    # sizes
    R,
    C,
    # strides
    s_n,
    s_r,
    s_c,
    s_on,
    s_or,
    s_oc,
    # options
    alpha,
    beta,
    diagonal,
    ADD: tl.constexpr,
    DIAGONAL: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Tiles [B, BN], BN a multiple of B. EVEN: R is a multiple of BN, C of BK. A program whose tile
    is above the diagonal has nothing to do; one below writes its tile and the mirror image. Tiles
    that the diagonal crosses, together BN x BN, are symmetric as they come where other is x:
    elements and their images are sums of the same products in the same order."""
    n_tile = tl.cdiv(R, BN)
    i_row = tl.program_id(0) // n_tile
    i_col = tl.program_id(0) % n_tile
    if (i_row + 1) * B <= i_col * BN:
        return
    i_n = tl.program_id(1).to(tl.int64)
    p_x += i_n * s_n
    p_other += i_n * s_on
    o_row = i_row * B + tl.arange(0, B)
    o_col = i_col * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    p_a = p_x + o_row.to(tl.int64)[:, None] * s_r + o_k.to(tl.int64)[None, :] * s_c  # [B, BK]
    p_b = (
        p_other + o_col.to(tl.int64)[None, :] * s_or + o_k.to(tl.int64)[:, None] * s_oc
    )  # [BK, BN]
    b_y = tl.zeros((B, BN), tl.float32)
    for k in range(0, C, BK):
        if EVEN:
            b_a = tl.load(p_a)
            b_b = tl.load(p_b)
        else:
            m_k = o_k < C - k
            b_a = tl.load(p_a, mask=(o_row < R)[:, None] & m_k[None, :], other=0.0)
            b_b = tl.load(p_b, mask=(o_col < R)[None, :] & m_k[:, None], other=0.0)
        b_y = tl.dot(b_a, b_b, b_y, input_precision=PRECISION)
        p_a += BK * s_c
        p_b += BK * s_oc
    b_y *= alpha
    plane = i_n * R * R
    p_y += plane
    o_y = o_row[:, None] * R + o_col[None, :]  # [row, col]
    mask = (o_row < R)[:, None] & (o_col < R)[None, :]
    if ADD:
        p_b_add = p_add + plane + o_y
        b_add = tl.load(p_b_add) if EVEN else tl.load(p_b_add, mask=mask, other=0.0)
        b_y += beta * b_add.to(tl.float32)
    if DIAGONAL:
        b_y += tl.where(o_row[:, None] == o_col[None, :], diagonal, 0.0)
    b_y = b_y.to(p_y.dtype.element_ty)
    if EVEN:
        tl.store(p_y + o_y, b_y)
    else:
        tl.store(p_y + o_y, b_y, mask=mask)
    if i_row * B >= (i_col + 1) * BN:
        o_image = o_col[:, None] * R + o_row[None, :]  # [col, row]
        if EVEN:
            tl.store(p_y + o_image, tl.trans(b_y))
        else:
            m_image = (o_row < R)[None, :] & (o_col < R)[:, None]
            tl.store(p_y + o_image, tl.trans(b_y), mask=m_image)
