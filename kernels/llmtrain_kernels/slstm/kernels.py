"""Triton kernels of the sLSTM: a program walks through all tokens of 16 rows in one head.

A step is: h to shared memory, a barrier, products with R, gates. What its code is laid out for:

- Products are of float16 halves on tensor cores: a float32 a is hi + lo / 2048 with float16 hi and
  lo, 22 bits of it, and a b = hi hi' + (hi lo' + lo hi') / 2048 (Ootomo and Yokota 2022,
  arXiv:2203.03341). R comes divided by a power of two; rows of dx are divided by one of their own.
- R is read anew for every token, 4 bytes a weight, from the nearest cache that holds it (V = 128),
  or stays in registers (V <= 64). In memory it has the order in which threads want it (arranged()
  in persistent.py), so that it goes from there into the operands' registers.
- A tile of 16 rows and V columns is a tensor [8 V, 2]: pairs of columns in the order in which W
  warps hold a product's result, [V / 8 W columns, 2 rows, W columns, 8 rows, 4 columns]. Loads and
  stores take on that order by themselves; as [16, V] each would go through shared memory.
- What the backward pass reads of a token is on its way during the token after it.

Another assignment of elements to threads than the one meant would be slower, not wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # of a tile: the least that tensor cores take
LOW = tl.constexpr(2048.0)  # lo is what float16 leaves of its 24 bits, times 2^11
LOG_FORGET_MAX = tl.constexpr(1e30)  # as in reference.py


@triton.jit
def tile_index(V: tl.constexpr, W: tl.constexpr):
    """(row [8 V, 1], column [8 V, 2]) of a tile's elements."""
    i = tl.arange(0, 8 * V)[:, None]
    i_row = i // (32 * W) % 2 * 8 + i // 4 % 8
    i_pair = (i // (64 * W) * W + i // 32 % W) * 4 + i % 4
    return i_row, i_pair * 2 + tl.arange(0, 2)[None, :]


@triton.jit
def from_matrix(b_matrix, V: tl.constexpr, W: tl.constexpr):
    """A tile from [16, V]."""
    b_tile = tl.reshape(b_matrix, (2, 8, V // (8 * W), W, 4, 2))
    return tl.reshape(tl.permute(b_tile, (2, 0, 3, 1, 4, 5)), (8 * V, 2))


@triton.jit
def halves(b_tile, V: tl.constexpr, W: tl.constexpr):
    """(hi, lo) of a tile as matrices [16, V]."""
    b_matrix = tl.reshape(b_tile, (V // (8 * W), 2, W, 8, 4, 2))
    b_matrix = tl.reshape(tl.permute(b_matrix, (1, 3, 0, 2, 4, 5)), (ROWS, V))
    b_hi = b_matrix.to(tl.float16)
    return b_hi, ((b_matrix - b_hi.to(tl.float32)) * LOW).to(tl.float16)


@triton.jit
def row_scale(b_tile, V: tl.constexpr, W: tl.constexpr):
    """(the power of two below the largest element of a row, one over it), [8 V, 1], of elements
    >= 0. Those of a row below float32's normal range count as zeros."""
    C: tl.constexpr = V // (8 * W)
    b_y = tl.max(tl.reshape(tl.max(b_tile, 1), (C, 2, W, 8, 4)), 0)
    b_y = tl.max(tl.reshape(tl.permute(b_y, (0, 2, 1, 3)), (2, 8, W * 4)), 2)
    b_bits = tl.minimum(b_y.to(tl.int32, bitcast=True) & (255 << 23), 253 << 23)
    b_bits = tl.broadcast_to(b_bits[None, :, None, :, None], (C, 2, W, 8, 4))
    b_bits = tl.reshape(b_bits, (8 * V, 1))
    inverse = (254 << 23) - b_bits
    return b_bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def weights(p_r, GATE: tl.constexpr, V: tl.constexpr, W: tl.constexpr):
    """(hi, lo) of a gate's [V, V], arranged."""
    p_r += GATE * 2 * V * V
    return arranged_matrix(p_r, GATE, V, W), arranged_matrix(p_r + V * V, GATE, V, W)


@triton.jit
def arranged_matrix(p_r, GATE: tl.constexpr, V: tl.constexpr, W: tl.constexpr):
    """With V = 128, R is 256 KB and a little too much for the first cache of an H100: what is read
    in turn would drive out what is wanted next. So the last gate's goes around it."""
    PAIRS: tl.constexpr = 2 if V >= 32 else 1
    p_flat = p_r + tl.arange(0, V * V)
    if GATE == 3 and V == 128:
        b_flat = tl.load(p_flat, cache_modifier=".cg")
    else:
        b_flat = tl.load(p_flat, eviction_policy="evict_last")
    b_r = tl.reshape(b_flat, (V // (8 * W), V // (16 * PAIRS), W, 8, 4, PAIRS, 2, 2))
    return tl.reshape(tl.permute(b_r, (1, 5, 6, 4, 7, 0, 2, 3)), (V, V))


@triton.jit
def held_weights(p_r, V: tl.constexpr, W: tl.constexpr, RESIDENT: tl.constexpr):
    """weights() of all four gates for gate_weights() to choose from, or nothing."""
    if RESIDENT:
        r_z, r_i = weights(p_r, 0, V, W), weights(p_r, 1, V, W)
        r_f, r_o = weights(p_r, 2, V, W), weights(p_r, 3, V, W)
        return r_z, r_i, r_f, r_o
    else:
        return ()


@triton.jit
def gate_weights(
    held, p_r, GATE: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RESIDENT: tl.constexpr
):
    """weights(), held or loaded now: at its product, because all four do not fit."""
    if RESIDENT:
        return held[GATE]
    else:
        return weights(p_r, GATE, V, W)


@triton.jit
def product(b_h, r, V: tl.constexpr, W: tl.constexpr):
    """The tile of h R; both as halves."""
    b_low = tl.dot(b_h[0], r[1])
    b_low = tl.dot(b_h[1], r[0], b_low)
    return from_matrix(tl.dot(b_h[0], r[0], b_low * (1 / LOW)), V, W)


@triton.jit
def add_product(b_main, b_low, b_tile, r, V: tl.constexpr, W: tl.constexpr):
    """(main, low), matrices [16, V] of which main + low / 2048 grows by tile R. Apart, because
    what is added to one matrix waits for each other."""
    b_hi, b_lo = halves(b_tile, V, W)
    b_main = tl.dot(b_hi, r[0], b_main)
    b_low = tl.dot(b_hi, r[1], b_low)
    return b_main, tl.dot(b_lo, r[0], b_low)


@triton.jit
def tanh_small(b_x):
    """tanh for |x| < 0.55: an odd polynomial, where 1 - 2 / (1 + exp(2 x)) would cancel."""
    b_x2 = b_x * b_x
    b_y = 1.57394409e-2 * b_x2 - 5.23025580e-2
    b_y = b_y * b_x2 + 1.33152977e-1
    b_y = b_y * b_x2 - 3.33327681e-1
    return b_x + b_x * b_x2 * b_y


@triton.jit
def twice_atanh(b_s):
    """2 atanh(s) for 0 <= s <= 1/3, its series."""
    b_s2 = b_s * b_s
    b_y = b_s2 / 13 + 1 / 11
    b_y = b_y * b_s2 + 1 / 9
    b_y = b_y * b_s2 + 1 / 7
    b_y = b_y * b_s2 + 1 / 5
    b_y = b_y * b_s2 + 1 / 3
    return 2 * (b_s + b_s * b_s2 * b_y)


@triton.jit
def activations(b_z, b_f, EXPONENTIAL: tl.constexpr):
    """(tanh z, log f, d log f / d f~). With one division: its unit is the slowest."""
    e_z = tl.exp(-2 * tl.abs(b_z))
    if EXPONENTIAL:
        inverse_z = 1 / (1 + e_z)
        log_f = tl.minimum(b_f, LOG_FORGET_MAX)
        b_slope = tl.where(b_f <= LOG_FORGET_MAX, 1.0, 0.0)
    else:
        # log(1 + e) = 2 atanh(e / (2 + e)): accurate for small e, where 1 + e is not
        e_f = tl.exp(-tl.abs(b_f))
        inverse = 1 / ((1 + e_z) * (1 + e_f) * (2 + e_f))
        inverse_z = (1 + e_f) * (2 + e_f) * inverse
        inverse_f = (1 + e_z) * inverse
        log_f = tl.minimum(b_f, 0.0) - twice_atanh(e_f * (1 + e_f) * inverse_f)
        b_slope = tl.where(b_f > 0, e_f, 1.0) * (2 + e_f) * inverse_f
    b_large = (1 - e_z) * inverse_z
    b_large = tl.where(b_z < 0, -b_large, b_large)
    return tl.where(tl.abs(b_z) < 0.55, tanh_small(b_z), b_large), log_f, b_slope


@triton.jit
def keep_and_write(b_d):
    """(f, i) after stabilisation from d = log f + m - i~: the larger one is 1."""
    b_e = tl.exp(-tl.abs(b_d))
    return tl.where(b_d > 0, 1.0, b_e), tl.where(b_d > 0, b_e, 1.0)


@triton.jit
def read(p, mask):
    """A tile that no one will read again: around the first cache, which R wants for itself."""
    return tl.load(p, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def write(p, b_tile, mask):
    tl.store(p, b_tile, mask=mask, cache_modifier=".cg")


@triton.jit(do_not_specialize=["B", "T", "H"])
def slstm_fwd_kernel(
    # read: [B, T, H, 4V], arranged [H, 4, 2, V, V], [H], (h, c, n, m) [4, B, H, V], [B, T + 1]
    p_x,
    p_r,
    p_r_scale,
    p_first,
    p_starts,
    # written: [B, T, H, V], (h, c, n, m) [4, B, H, V]; if SAVE (z, d, slope of log f, o)
    # [B, T, H, 4V], and (c, n) before every token and after the last [B, T + 1, H, 2V]
    p_h,
    p_last,
    p_gates,
    p_memory,
    # sizes
    B,
    T,
    H,
    V: tl.constexpr,
    W: tl.constexpr,
    # options
    EXPONENTIAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    SAVE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_row, i_col = tile_index(V, W)
    i_row = (i_row + i_tile * ROWS).to(tl.int64)
    mask = i_row < B
    o_state = (i_row * H + i_head) * V + i_col  # [8V, 2], as all that follow
    o_h = (i_row * T * H + i_head) * V + i_col
    o_x = (i_row * T * H + i_head) * 4 * V + i_col
    o_memory = (i_row * (T + 1) * H + i_head) * 2 * V + i_col
    plane = B.to(tl.int64) * H * V

    b_h = tl.load(p_first + o_state, mask=mask, other=0.0)
    b_c = tl.load(p_first + plane + o_state, mask=mask, other=0.0)
    b_n = tl.load(p_first + 2 * plane + o_state, mask=mask, other=0.0)
    b_m = tl.load(p_first + 3 * plane + o_state, mask=mask, other=0.0)
    if SAVE:
        write(p_memory + o_memory, b_c, mask)
        write(p_memory + o_memory + V, b_n, mask)
    r_scale = tl.load(p_r_scale + i_head)
    p_r += i_head * 8 * V * V
    held = held_weights(p_r, V, W, RESIDENT)
    for t in range(T):
        h_halves = halves(b_h, V, W)
        r_z = gate_weights(held, p_r, 0, V, W, RESIDENT)
        b_z = read(p_x + o_x, mask) + product(h_halves, r_z, V, W) * r_scale
        r_i = gate_weights(held, p_r, 1, V, W, RESIDENT)
        b_i = read(p_x + o_x + V, mask) + product(h_halves, r_i, V, W) * r_scale
        r_f = gate_weights(held, p_r, 2, V, W, RESIDENT)
        b_f = read(p_x + o_x + 2 * V, mask) + product(h_halves, r_f, V, W) * r_scale
        r_o = gate_weights(held, p_r, 3, V, W, RESIDENT)
        b_o = read(p_x + o_x + 3 * V, mask) + product(h_halves, r_o, V, W) * r_scale

        b_z, log_f, b_slope = activations(b_z, b_f, EXPONENTIAL)
        b_carried = tl.where(b_n == 0, float("-inf"), log_f + b_m)
        b_d = b_carried - b_i
        b_m = tl.maximum(b_carried, b_i)
        keep, new = keep_and_write(b_d)
        b_c = keep * b_c + new * b_z
        b_n = keep * b_n + new
        b_inverse = 1 / (b_n * (1 + tl.exp(-b_o)))
        b_o = b_n * b_inverse
        b_h = b_c * b_inverse

        write(p_h + o_h, b_h, mask)
        if SAVE:
            p_memory += H * 2 * V
            write(p_gates + o_x, b_z, mask)
            write(p_gates + o_x + V, b_d, mask)
            write(p_gates + o_x + 2 * V, b_slope, mask)
            write(p_gates + o_x + 3 * V, b_o, mask)
            write(p_memory + o_memory, b_c, mask)
            write(p_memory + o_memory + V, b_n, mask)
        if DOCUMENTS:
            ends = tl.load(p_starts + i_row * (T + 1) + t + 1, mask=mask, other=0) != 0
            b_h = tl.where(ends, 0.0, b_h)
            b_c = tl.where(ends, 0.0, b_c)
            b_n = tl.where(ends, 0.0, b_n)
        p_x += H * 4 * V
        p_gates += H * 4 * V
        p_h += H * V
    tl.store(p_last + o_state, b_h, mask=mask)
    tl.store(p_last + plane + o_state, b_c, mask=mask)
    tl.store(p_last + 2 * plane + o_state, b_n, mask=mask)
    tl.store(p_last + 3 * plane + o_state, b_m, mask=mask)


@triton.jit(do_not_specialize=["B", "T", "H"])
def slstm_bwd_kernel(
    # read: [B, T, H, V], of (h, c, n) after the last [3, B, H, V], arranged R^T [H, 4, 2, V, V],
    # [H], what the forward kernel saved, [B, T + 1]
    p_dh,
    p_dlast,
    p_r,
    p_r_scale,
    p_gates,
    p_memory,
    p_starts,
    # written: [B, T, H, 4V], of (h, c, n) before the first [3, B, H, V]
    p_dx,
    p_dfirst,
    # sizes
    B,
    T,
    H,
    V: tl.constexpr,
    W: tl.constexpr,
    # options
    DOCUMENTS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_row, i_col = tile_index(V, W)
    i_row = (i_row + i_tile * ROWS).to(tl.int64)
    mask = i_row < B
    o_state = (i_row * H + i_head) * V + i_col  # [8V, 2], as all that follow
    o_h = (i_row * T * H + i_head) * V + i_col
    o_x = (i_row * T * H + i_head) * 4 * V + i_col
    o_memory = (i_row * (T + 1) * H + i_head) * 2 * V + i_col
    plane = B.to(tl.int64) * H * V
    final = (tl.zeros((), tl.int64) + T - 1) * H * V
    p_dh += final
    p_gates += 4 * final
    p_dx += 4 * final
    p_memory += 2 * final

    b_dc = tl.load(p_dlast + plane + o_state, mask=mask, other=0.0)
    b_dn = tl.load(p_dlast + 2 * plane + o_state, mask=mask, other=0.0)
    b_dh = tl.load(p_dlast + o_state, mask=mask, other=0.0) + read(p_dh + o_h, mask)
    b_c = read(p_memory + o_memory + H * 2 * V, mask)
    b_n = tl.load(p_memory + o_memory + H * 2 * V + V, mask=mask, other=1.0)
    b_z = read(p_gates + o_x, mask)
    b_d = read(p_gates + o_x + V, mask)
    b_slope = read(p_gates + o_x + 2 * V, mask)
    b_o = read(p_gates + o_x + 3 * V, mask)
    b_c_before = read(p_memory + o_memory, mask)
    b_n_before = tl.load(p_memory + o_memory + V, mask=mask, other=1.0)
    r_scale = tl.load(p_r_scale + i_head)
    p_r += i_head * 8 * V * V
    held = held_weights(p_r, V, W, RESIDENT)
    for k in range(T):
        b_inverse = 1 / b_n
        b_ratio = b_c * b_inverse
        keep, new = keep_and_write(b_d)
        b_u = b_dh * b_o  # the gradient of c / n
        b_do = b_u * b_ratio * (1 - b_o)
        b_u = b_u * b_inverse
        b_dc += b_u
        b_dn -= b_u * b_ratio
        b_dz = b_dc * new * (1 - b_z * b_z)
        b_di = new * (b_dc * b_z + b_dn)
        b_df = keep * b_slope * (b_dc * b_c_before + b_dn * b_n_before)
        b_dc *= keep
        b_dn *= keep
        write(p_dx + o_x, b_dz, mask)
        write(p_dx + o_x + V, b_di, mask)
        write(p_dx + o_x + 2 * V, b_df, mask)
        write(p_dx + o_x + 3 * V, b_do, mask)

        # of the token before, wanted in the next turn
        p_dh -= H * V
        p_gates -= H * 4 * V
        p_dx -= H * 4 * V
        p_memory -= H * 2 * V
        more = mask & (k < T - 1)
        b_c = b_c_before
        b_n = b_n_before
        b_dh_before = read(p_dh + o_h, more)
        b_z = read(p_gates + o_x, more)
        b_d = read(p_gates + o_x + V, more)
        b_slope = read(p_gates + o_x + 2 * V, more)
        b_o = read(p_gates + o_x + 3 * V, more)
        b_c_before = read(p_memory + o_memory, more)
        b_n_before = tl.load(p_memory + o_memory + V, mask=more, other=1.0, cache_modifier=".cg")

        b_largest = tl.maximum(
            tl.maximum(tl.abs(b_dz), tl.abs(b_di)), tl.maximum(tl.abs(b_df), tl.abs(b_do))
        )
        scale, shrink = row_scale(b_largest, V, W)
        b_main = tl.zeros((ROWS, V), tl.float32)
        b_low = tl.zeros((ROWS, V), tl.float32)
        r_z = gate_weights(held, p_r, 0, V, W, RESIDENT)
        b_main, b_low = add_product(b_main, b_low, b_dz * shrink, r_z, V, W)
        r_i = gate_weights(held, p_r, 1, V, W, RESIDENT)
        b_main, b_low = add_product(b_main, b_low, b_di * shrink, r_i, V, W)
        r_f = gate_weights(held, p_r, 2, V, W, RESIDENT)
        b_main, b_low = add_product(b_main, b_low, b_df * shrink, r_f, V, W)
        r_o = gate_weights(held, p_r, 3, V, W, RESIDENT)
        b_main, b_low = add_product(b_main, b_low, b_do * shrink, r_o, V, W)
        b_dh = from_matrix(b_main, V, W) + from_matrix(b_low, V, W) * (1 / LOW)
        b_dh *= scale * r_scale
        if DOCUMENTS:
            begins = tl.load(p_starts + i_row * (T + 1) + T - 1 - k, mask=mask, other=0) != 0
            b_dh = tl.where(begins, 0.0, b_dh)
        b_dh += b_dh_before
    tl.store(p_dfirst + o_state, b_dh, mask=mask)
    tl.store(p_dfirst + plane + o_state, b_dc, mask=mask)
    tl.store(p_dfirst + 2 * plane + o_state, b_dn, mask=mask)
