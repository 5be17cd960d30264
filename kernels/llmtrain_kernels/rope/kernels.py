"""Triton kernel of rotary embedding: a program turns ROWS pairs of a token and a head.

Heads of keys follow those of queries, so that every lane has work whatever their numbers are. A
program is short: all that it reads is on its way before it waits for any of it, and many programs
at a time keep memory busy. Angles are read for every pair, from the caches: neighbouring pairs are
of one token. A head's halves lie in one thread, and nothing goes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(b_a, b_b, b_cos, b_sin):
    """The pair in float32."""
    b_a = b_a.to(tl.float32)
    b_b = b_b.to(tl.float32)
    return b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    # read: [B, T, H, K], [B, T, G, K'] with neighbouring elements, [B or 1, T, R] twice
    p_q,
    p_k,
    p_cos,
    p_sin,
    # written: [B, T, H, K], [B, T, G, K']
    p_q_out,
    p_k_out,
    # sizes, and strides of q, of k and of the angles' rows
    T,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    angle_row,
    H: tl.constexpr,
    G: tl.constexpr,
    Q_WIDTH: tl.constexpr,
    K_WIDTH: tl.constexpr,
    Q_START: tl.constexpr,
    K_START: tl.constexpr,
    R: tl.constexpr,
    # options
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    WIDE: tl.constexpr = triton.next_power_of_2(R)
    dtype = p_q_out.dtype.element_ty
    i_row = tl.program_id(1).to(tl.int64)
    i_pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i_token = i_pair // (H + G)
    i_head = i_pair % (H + G)
    m_pair = i_token < T
    p_q += i_row * q_row
    p_q_out += i_row * T * H * Q_WIDTH
    p_x = p_q + (i_token.to(tl.int64) * q_token + i_head.to(tl.int64) * q_head)  # [ROWS, 1]
    p_y = p_q_out + (i_token * H + i_head).to(tl.int64) * Q_WIDTH
    start, width = Q_START, Q_WIDTH
    if G > 0:
        query, i_head = i_head < H, i_head - H
        p_k += i_row * k_row
        p_k_out += i_row * T * G * K_WIDTH
        p_key = p_k + (i_token.to(tl.int64) * k_token + i_head.to(tl.int64) * k_head)
        p_x = tl.where(query, p_x, p_key)
        p_y = tl.where(query, p_y, p_k_out + (i_token * G + i_head).to(tl.int64) * K_WIDTH)
        start = tl.where(query, Q_START, K_START)
        width = tl.where(query, Q_WIDTH, K_WIDTH)

    # dimensions that turn
    o_half = tl.arange(0, WIDE)[None, :]
    m_half = m_pair & (o_half < R)
    o_both = tl.arange(0, 2 * WIDE)[None, :]
    m_both = m_pair & (o_both < 2 * R)
    if INTERLEAVED:
        b_x = tl.load(p_x + start + o_both, mask=m_both, other=0.0)  # [ROWS, 2 WIDE]
        b_a, b_b = tl.split(tl.reshape(b_x, (ROWS, WIDE, 2)))
    else:
        b_a = tl.load(p_x + start + o_half, mask=m_half, other=0.0)  # [ROWS, WIDE]
        b_b = tl.load(p_x + start + R + o_half, mask=m_half, other=0.0)
    o_angle = i_row * angle_row + i_token.to(tl.int64) * R + o_half
    b_cos = tl.load(p_cos + o_angle, mask=m_half, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_half, other=0.0)

    # dimensions before and after them, as they are
    BEFORE: tl.constexpr = Q_START if Q_START > K_START else K_START
    Q_AFTER: tl.constexpr = Q_WIDTH - Q_START - 2 * R
    K_AFTER: tl.constexpr = K_WIDTH - K_START - 2 * R
    AFTER: tl.constexpr = Q_AFTER if Q_AFTER > K_AFTER else K_AFTER
    if BEFORE > 0:
        o_before = tl.arange(0, triton.next_power_of_2(BEFORE))[None, :]
        m_before = m_pair & (o_before < start)
        b_before = tl.load(p_x + o_before, mask=m_before, other=0.0)
    if AFTER > 0:
        o_after = start + 2 * R + tl.arange(0, triton.next_power_of_2(AFTER))[None, :]
        m_after = m_pair & (o_after < width)
        b_after = tl.load(p_x + o_after, mask=m_after, other=0.0)
    if BEFORE > 0:  # stores that wait for no arithmetic come first: no load is put off past them
        tl.store(p_y + o_before, b_before, mask=m_before)
    if AFTER > 0:
        tl.store(p_y + o_after, b_after, mask=m_after)

    if INVERSE:
        b_sin = -b_sin
    b_a, b_b = turn(b_a, b_b, b_cos, b_sin)
    if INTERLEAVED:
        b_y = tl.reshape(tl.join(b_a.to(dtype), b_b.to(dtype)), (ROWS, 2 * WIDE))
        tl.store(p_y + start + o_both, b_y, mask=m_both)
    else:
        tl.store(p_y + start + o_half, b_a.to(dtype), mask=m_half)
        tl.store(p_y + start + R + o_half, b_b.to(dtype), mask=m_half)
