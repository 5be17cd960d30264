"""Triton kernel of rotary embedding: a program turns all heads of TOKENS tokens.

It walks over HEADS heads at a time, first of the queries, then of the keys. The angles of its
tokens are read once and stay in registers, in the layout of a tile of heads: nothing goes through
shared memory. A pair's halves lie in one thread.
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


@triton.jit
def copy(p_from, p_to, m_head, START: tl.constexpr, WIDTH: tl.constexpr):
    """Dimensions [START, START + WIDTH) as they are."""
    if WIDTH > 0:
        o_col = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
        mask = m_head & (o_col < WIDTH)
        b_x = tl.load(p_from + START + o_col, mask=mask, other=0.0)
        tl.store(p_to + START + o_col, b_x, mask=mask)


@triton.jit
def turn_heads(
    p_x,
    p_y,
    x_head,
    i_head,
    m_token,
    b_cos,
    b_sin,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    START: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """COUNT heads of width K of every token, of which [START, START + 2 R) turns. p_x, p_y: [N, 1]
    where the tokens begin."""
    WIDE: tl.constexpr = triton.next_power_of_2(R)
    dtype = p_y.dtype.element_ty
    o_half = tl.arange(0, WIDE)[None, :]
    o_pairs = tl.arange(0, 2 * WIDE)[None, :]
    for first in range(0, COUNT, HEADS):
        m_head = m_token & (first + i_head < COUNT)  # [N, 1]
        p_from = p_x + (first + i_head) * x_head
        p_to = p_y + (first + i_head) * K
        if INTERLEAVED:
            mask = m_head & (o_pairs < 2 * R)
            b_x = tl.load(p_from + START + o_pairs, mask=mask, other=0.0)  # [N, 2 WIDE]
            b_a, b_b = tl.split(tl.reshape(b_x, (b_x.shape[0], WIDE, 2)))
            b_a, b_b = turn(b_a, b_b, b_cos, b_sin)
            b_y = tl.reshape(tl.join(b_a.to(dtype), b_b.to(dtype)), (b_x.shape[0], 2 * WIDE))
            tl.store(p_to + START + o_pairs, b_y, mask=mask)
        else:
            mask = m_head & (o_half < R)
            b_a = tl.load(p_from + START + o_half, mask=mask, other=0.0)  # [N, WIDE]
            b_b = tl.load(p_from + START + R + o_half, mask=mask, other=0.0)
            b_a, b_b = turn(b_a, b_b, b_cos, b_sin)
            tl.store(p_to + START + o_half, b_a.to(dtype), mask=mask)
            tl.store(p_to + START + R + o_half, b_b.to(dtype), mask=mask)
        copy(p_from, p_to, m_head, 0, START)
        copy(p_from, p_to, m_head, START + 2 * R, K - START - 2 * R)


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
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    blocks = tl.cdiv(T, TOKENS)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i_pair = tl.arange(0, TOKENS * HEADS)[:, None]  # of a token and a head
    i_token = (tl.program_id(0) % blocks * TOKENS + i_pair // HEADS).to(tl.int64)
    i_head = (i_pair % HEADS).to(tl.int64)
    m_token = i_token < T
    o_angle = tl.arange(0, triton.next_power_of_2(R))[None, :]
    mask = m_token & (o_angle < R)
    o_angle = i_row * angle_row + i_token * R + o_angle
    b_cos = tl.load(p_cos + o_angle, mask=mask, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=mask, other=0.0)
    if INVERSE:
        b_sin = -b_sin
    turn_heads(
        p_q + i_row * q_row + i_token * q_token,
        p_q_out + (i_row * T + i_token) * H * Q_WIDTH,
        q_head,
        i_head,
        m_token,
        b_cos,
        b_sin,
        H,
        Q_WIDTH,
        Q_START,
        R,
        HEADS,
        INTERLEAVED,
    )
    if G > 0:
        turn_heads(
            p_k + i_row * k_row + i_token * k_token,
            p_k_out + (i_row * T + i_token) * G * K_WIDTH,
            k_head,
            i_head,
            m_token,
            b_cos,
            b_sin,
            G,
            K_WIDTH,
            K_START,
            R,
            HEADS,
            INTERLEAVED,
        )
