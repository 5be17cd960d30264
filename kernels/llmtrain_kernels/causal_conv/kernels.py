"""Triton kernels of the causal convolution.

A program walks along the tokens [t0, t0 + SPAN) of one row with BLOCK_D channels, ROWS of them a
turn: their loads are on their way together, then each token meets the W - 1 before it, which stay
in registers. So every x is loaded once, but for W - 1 rows at the edge of a span; threads hold
channels side by side and exchange nothing.

- Backward, the pre-activation z is formed again. dx of a token wants g = dL/dz of the W - 1 tokens
  after it: sums of W - 1 tokens are pending in registers, and a span reads W - 1 rows beyond its
  end. What a span adds to the gradients of weight and bias is written in float32, and a second
  kernel sums it over spans: the order never changes.
- Documents: ids never fall, so a turn whose last id is that of the token before it begins none, and
  takes the code without borders. At a border the inputs before it become zeros, and the pending
  sums of dx are written, since nothing more comes to them.
- D and the strides come in units of ALIGN elements: then the compiler knows that rows are aligned,
  whatever the numbers are.
- Triton decides `is None` while it compiles, but not as a part of `and` and `or`: hence nested ifs.
"""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_LOG2E = tl.constexpr(-1.4426950408889634)


@triton.jit
def taps(p_weight, o_d, m_d, W: tl.constexpr):
    """weight[:, k] of the channels, for k = 0 .. W - 1, in float32. Each load touches as many lines
    as there are threads: for programs that live long."""
    b_taps = ()
    for k in tl.static_range(W):
        b_taps += (tl.load(p_weight + o_d * W + k, mask=m_d, other=0.0).to(tl.float32),)
    return b_taps


@triton.jit
def taps_at_once(p_weight, o_d, m_d, W: tl.constexpr):
    """The same by one load of [BLOCK_D, W], a channel's taps side by side, which then change
    threads: for programs of few tokens, where it is a part of their time."""
    o_w = tl.arange(0, triton.next_power_of_2(W))[None, :]
    mask = m_d[:, None] & (o_w < W)
    b_weight = tl.load(p_weight + o_d[:, None] * W + o_w, mask=mask, other=0.0).to(tl.float32)
    b_taps = ()
    for k in tl.static_range(W):
        b_taps += (tl.sum(tl.where(o_w == k, b_weight, 0.0), 1),)
    return b_taps


@triton.jit
def load_rows(p_rows, stride_t, t, T, o_d, m_d, ROWS: tl.constexpr):
    """Rows t .. t + ROWS - 1, of which p_rows is the first; zeros from T on."""
    b_rows = ()
    for r in tl.static_range(ROWS):
        b_rows += (tl.load(p_rows + r * stride_t + o_d, mask=m_d & (t + r < T), other=0.0),)
    return b_rows


@triton.jit
def input_row(p_x, stride_t, p_state, t, D, o_d, m_d, W: tl.constexpr):
    """x of token t < T of a row whose first token is at p_x; before it the state's, or zeros."""
    b_x = tl.load(p_x + t.to(tl.int64) * stride_t + o_d, mask=m_d & (t >= 0), other=0.0)
    if p_state is not None:
        p_before = p_state + (t + W - 1) * D + o_d
        b_x = tl.where(t >= 0, b_x, tl.load(p_before, mask=m_d & (t < 0), other=0.0))
    return b_x


@triton.jit
def rows_before(p_x, stride_t, p_state, t, D, o_d, m_d, W: tl.constexpr):
    """The W - 1 inputs before token t, in float32."""
    b_rows = ()
    for k in tl.static_range(W - 1):
        b_x = input_row(p_x, stride_t, p_state, t - (W - 1) + k, D, o_d, m_d, W)
        b_rows += (b_x.to(tl.float32),)
    return b_rows


@triton.jit
def id_at(p_ids, t, T):
    """Of token t; before the first and from T on that of the nearest."""
    return tl.load(p_ids + tl.minimum(tl.maximum(t, 0), T - 1))


@triton.jit
def in_document(b_before, p_ids, t, T, W: tl.constexpr):
    """The rows before token t, zeros where they are of another document."""
    b_seen = ()
    for k in tl.static_range(W - 1):
        same = id_at(p_ids, t - (W - 1) + k, T) == id_at(p_ids, t, T)
        b_seen += (tl.where(same, b_before[k], 0.0),)
    return b_seen


@triton.jit
def zeros_if(begins, b_before, W: tl.constexpr):
    """The rows before a token that begins a document are not its own."""
    b_seen = ()
    for k in tl.static_range(W - 1):
        b_seen += (tl.where(begins, 0.0, b_before[k]),)
    return b_seen


@triton.jit
def weighted_sum(b_seen, b_x, b_taps, b_bias, W: tl.constexpr):
    """z: what the activation is applied to."""
    b_z = b_bias + b_x * b_taps[W - 1]
    for k in tl.static_range(W - 1):
        b_z += b_seen[k] * b_taps[k]
    return b_z


@triton.jit
def sigmoid(b_z):
    """In half the instructions of tl.sigmoid, whose exponential and division care for numbers below
    2^-126: here those are 0."""
    b_root = tl.rsqrt(1 + tl.exp2(b_z * MINUS_LOG2E))
    return b_root * b_root


@triton.jit
def forward_rows(
    b_before,
    b_rows,
    b_taps,
    b_bias,
    p_y,
    p_ids,
    t,
    T,
    D,
    o_d,
    m_d,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    BORDERS: tl.constexpr,
):
    """Writes y of ROWS tokens, of which some begin documents if BORDERS; gives the W - 1 inputs
    before the next."""
    for r in tl.static_range(ROWS):
        b_x = b_rows[r].to(tl.float32)
        if BORDERS:
            begins = id_at(p_ids, t + r - 1, T) != id_at(p_ids, t + r, T)
            b_before = zeros_if(begins, b_before, W)
        b_y = weighted_sum(b_before, b_x, b_taps, b_bias, W)
        if SILU:
            b_y *= sigmoid(b_y)
        tl.store(p_y + r * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d & (t + r < T))
        b_before += (b_x,)
        b_before = b_before[1:]
    return b_before


@triton.jit(do_not_specialize=["T", "N_D", "N_T", "D_UNITS", "SPAN", "x_b", "x_t"])
def causal_conv_fwd_kernel(
    # read: [B, T, D] strided, [D, W], [D], [B, W-1, D], [B, T]; the last three may be None
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_ids,
    # written: [B, T, D], and if wanted the last inputs [B, W-1, D], else None
    p_y,
    p_last,
    # sizes: blocks of channels, spans of a row
    T,
    N_D,
    N_T,
    D_UNITS,
    SPAN,
    # strides, of x in units
    x_b,
    x_t,
    # options
    W: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_d = tl.program_id(0) % N_D
    i_t = tl.program_id(0) // N_D % N_T
    i_b = (tl.program_id(0) // N_D // N_T).to(tl.int64)
    D, stride_t = D_UNITS * ALIGN, x_t.to(tl.int64) * ALIGN
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    t0 = i_t * SPAN
    p_x += i_b * x_b * ALIGN
    p_y += (i_b * T + t0) * D
    if p_ids is not None:
        p_ids += i_b * T
    if p_state is not None:
        p_state += i_b * (W - 1) * D

    b_taps = taps_at_once(p_weight, o_d, m_d, W)
    b_bias = tl.zeros((BLOCK_D,), tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_before = rows_before(p_x, stride_t, p_state, t0, D, o_d, m_d, W)
    if p_ids is not None:
        b_before = in_document(b_before, p_ids, t0, T, W)
        id_before = id_at(p_ids, t0 - 1, T)
    p_rows = p_x + t0.to(tl.int64) * stride_t
    for t in tl.range(t0, tl.minimum(t0 + SPAN, T), ROWS, num_stages=STAGES):
        b_rows = load_rows(p_rows, stride_t, t, T, o_d, m_d, ROWS)
        at = (p_y, p_ids, t, T, D, o_d, m_d)
        if p_ids is not None:
            id_last = id_at(p_ids, t + ROWS - 1, T)
        if p_ids is None:  # noqa: SIM114
            b_before = forward_rows(b_before, b_rows, b_taps, b_bias, *at, W, ROWS, SILU, False)
        elif id_before == id_last:
            b_before = forward_rows(b_before, b_rows, b_taps, b_bias, *at, W, ROWS, SILU, False)
        else:  # seldom: row after row, so that it takes few registers
            for r in range(ROWS):
                b_row = load_rows(p_rows + r * stride_t, stride_t, t + r, T, o_d, m_d, 1)
                at = (p_y + r * D, p_ids, t + r, T, D, o_d, m_d)
                b_before = forward_rows(b_before, b_row, b_taps, b_bias, *at, W, 1, SILU, True)
        if p_ids is not None:
            id_before = id_last
        p_rows += ROWS * stride_t
        p_y += ROWS * D
    if p_last is not None:  # noqa: SIM102
        if i_t == N_T - 1:
            for k in tl.static_range(W - 1):
                t = T - (W - 1) + k
                b_x = input_row(p_x, stride_t, p_state, t, D, o_d, m_d, W)
                if p_ids is not None:
                    b_x = tl.where(id_at(p_ids, t, T) == id_at(p_ids, T - 1, T), b_x, 0.0)
                tl.store(p_last + (i_b * (W - 1) + k) * D + o_d, b_x, mask=m_d)


@triton.jit
def backward_row(
    b_before,
    b_pending,
    b_x,
    b_dy,
    b_taps,
    b_bias,
    W: tl.constexpr,
    SILU: tl.constexpr,
):
    """(g of a token, sums of g times taps for the W tokens up to it)."""
    b_g = b_dy.to(tl.float32)
    if SILU:
        b_z = weighted_sum(b_before, b_x, b_taps, b_bias, W)
        b_s = sigmoid(b_z)
        b_g *= b_s * (1 + b_z * (1 - b_s))
    b_sums = ()
    for k in tl.static_range(W - 1):
        b_sums += (b_pending[k] + b_g * b_taps[k],)
    b_sums += (b_g * b_taps[W - 1],)
    return b_g, b_sums


@triton.jit
def store_dx(b_dx, p_dx, fixed, s, first, T, D, o_d, m_d, W: tl.constexpr):
    """dx of token s of a span, if `first` is no later; before the row's first token the gradient of
    the state. With what the last inputs' gradient gives to it."""
    _, _, p_dstate, p_dlast, p_ids, end = fixed
    if p_dlast is not None:
        k = s - (T - (W - 1))
        last = k >= 0
        if p_ids is not None:
            last = last & (id_at(p_ids, s, T) == id_at(p_ids, T - 1, T))
        p_share = p_dlast + k * D + o_d
        b_dx += tl.load(p_share, mask=m_d & last & (s < T), other=0.0).to(tl.float32)
    b_dx = b_dx.to(p_dx.dtype.element_ty)
    tl.store(p_dx + o_d, b_dx, mask=m_d & (s >= first) & (s < end))
    if p_dstate is not None:
        tl.store(p_dstate + (s + W - 1) * D + o_d, b_dx, mask=m_d & (s < 0))


@triton.jit
def backward_rows(
    held,
    b_xs,
    b_dys,
    fixed,
    p_dx,
    t,
    T,
    D,
    o_d,
    m_d,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    BORDERS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Writes dx of tokens t - W + 1 .. t - W + ROWS, p_dx being token t's; INSIDE the span, adds
    to the gradients of taps and bias. BORDERS: some begin documents. held: (inputs before, pending
    sums, those gradients, the first token whose dx is wanted)."""
    b_before, b_pending, b_sums, first = held
    b_taps, b_bias, _, _, p_ids, _ = fixed
    for r in tl.static_range(ROWS):
        if BORDERS:  # sums of earlier tokens are whole: g of later ones is none of theirs
            begins = id_at(p_ids, t + r - 1, T) != id_at(p_ids, t + r, T)
            for k in tl.static_range(W - 1):
                back = r - (W - 1) + k
                at = (p_dx + back * D, fixed, t + back, first, T, D, o_d, m_d & begins)
                store_dx(b_pending[k], *at, W)
            b_before = zeros_if(begins, b_before, W)
            first = tl.where(begins, t + r, first)
        b_x = b_xs[r].to(tl.float32)
        b_g, b_dx = backward_row(b_before, b_pending, b_x, b_dys[r], b_taps, b_bias, W, SILU)
        b_before += (b_x,)
        if INSIDE:
            b_new = ()
            for k in tl.static_range(W):
                b_new += (b_sums[k] + b_g * b_before[k],)
            b_new += (b_sums[W] + b_g if BIAS else b_sums[W],)
            b_sums = b_new
        back = r - (W - 1)
        store_dx(b_dx[0], p_dx + back * D, fixed, t + back, first, T, D, o_d, m_d, W)
        b_pending = b_dx[1:]
        b_before = b_before[1:]
    return b_before, b_pending, b_sums, first


@triton.jit(
    do_not_specialize=[
        "T",
        "N_D",
        "N_T",
        "D_UNITS",
        "SPAN",
        "x_b",
        "x_t",
        "dy_b",
        "dy_t",
    ]
)
def causal_conv_bwd_kernel(
    # read: [B, T, D] strided, of the last inputs [B, W-1, D] or None, as the forward kernel
    p_dy,
    p_dlast,
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_ids,
    # written: [B, T, D], [B, W-1, D] or None, of taps and bias by span [B, N_T, W + 1, D] float32
    p_dx,
    p_dstate,
    p_sums,
    # sizes: blocks of channels, spans of a row
    T,
    N_D,
    N_T,
    D_UNITS,
    SPAN,
    # strides, of dy and x in units
    dy_b,
    dy_t,
    x_b,
    x_t,
    # options
    W: tl.constexpr,
    SILU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_d = tl.program_id(0) % N_D
    i_span = tl.program_id(0) // N_D
    i_t = i_span % N_T
    i_b = (i_span // N_T).to(tl.int64)
    D, x_t, dy_t = D_UNITS * ALIGN, x_t.to(tl.int64) * ALIGN, dy_t.to(tl.int64) * ALIGN
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    t0 = i_t * SPAN
    p_x += i_b * x_b * ALIGN
    p_dx += (i_b * T + t0) * D
    p_sums += i_span.to(tl.int64) * (W + 1) * D + o_d
    if p_ids is not None:
        p_ids += i_b * T
    if p_state is not None:
        p_state += i_b * (W - 1) * D
        p_dstate += i_b * (W - 1) * D
    if p_dlast is not None:
        p_dlast += i_b * (W - 1) * D

    b_taps = taps(p_weight, o_d, m_d, W)
    b_zero = tl.zeros((BLOCK_D,), tl.float32)
    b_bias = b_zero
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_before = rows_before(p_x, x_t, p_state, t0, D, o_d, m_d, W)
    if p_ids is not None:
        b_before = in_document(b_before, p_ids, t0, T, W)
        id_before = id_at(p_ids, t0 - 1, T)
    BIAS: tl.constexpr = p_bias is not None
    held = b_before, (b_zero,) * (W - 1), (b_zero,) * (W + 1), t0
    fixed = b_taps, b_bias, p_dstate, p_dlast, p_ids, tl.minimum(t0 + SPAN, T)
    p_xs = p_x + t0.to(tl.int64) * x_t
    p_dys = p_dy + i_b * dy_b * ALIGN + t0.to(tl.int64) * dy_t
    for t in tl.range(t0, t0 + SPAN, ROWS, num_stages=STAGES):
        b_xs = load_rows(p_xs, x_t, t, T, o_d, m_d, ROWS)
        b_dys = load_rows(p_dys, dy_t, t, T, o_d, m_d, ROWS)
        at = (p_dx, t, T, D, o_d, m_d)
        if p_ids is not None:
            id_last = id_at(p_ids, t + ROWS - 1, T)
        if p_ids is None:  # noqa: SIM114
            held = backward_rows(held, b_xs, b_dys, fixed, *at, W, ROWS, SILU, BIAS, False, True)
        elif id_before == id_last:
            held = backward_rows(held, b_xs, b_dys, fixed, *at, W, ROWS, SILU, BIAS, False, True)
        else:  # seldom: row after row, so that it takes few registers
            for r in range(ROWS):
                b_x = load_rows(p_xs + r * x_t, x_t, t + r, T, o_d, m_d, 1)
                b_dy = load_rows(p_dys + r * dy_t, dy_t, t + r, T, o_d, m_d, 1)
                at = (p_dx + r * D, t + r, T, D, o_d, m_d)
                held = backward_rows(held, b_x, b_dy, fixed, *at, W, 1, SILU, BIAS, True, True)
        if p_ids is not None:
            id_before = id_last
        p_xs += ROWS * x_t
        p_dys += ROWS * dy_t
        p_dx += ROWS * D
    # what the span's last tokens want of those after it
    PACKED: tl.constexpr = p_ids is not None
    for r in tl.static_range(W - 1):
        t = t0 + SPAN + r
        b_x = load_rows(p_xs + r * x_t, x_t, t, T, o_d, m_d, 1)
        b_dy = load_rows(p_dys + r * dy_t, dy_t, t, T, o_d, m_d, 1)
        at = (p_dx + r * D, t, T, D, o_d, m_d)
        held = backward_rows(held, b_x, b_dy, fixed, *at, W, 1, SILU, BIAS, PACKED, False)
    for k in tl.static_range(W + 1 if BIAS else W):
        tl.store(p_sums + k * D, held[2][k], mask=m_d)


@triton.jit(do_not_specialize=["N", "D"])
def causal_conv_bwd_sum_kernel(
    # read: [N, W + 1, D] float32. written: [D, W], and [D] or None
    p_sums,
    p_dweight,
    p_dbias,
    # sizes
    N,
    D,
    # options
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over spans, of one tap or the bias."""
    i_k = tl.program_id(1)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_n = tl.arange(0, BLOCK_N)
    b_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for n in range(0, N, BLOCK_N):
        o_row = ((n + o_n).to(tl.int64) * (W + 1) + i_k) * D
        m_n = (n + o_n < N)[:, None] & m_d[None, :]
        b_sums += tl.load(p_sums + o_row[:, None] + o_d[None, :], mask=m_n, other=0.0)
    b_sum = tl.sum(b_sums, 0)
    if i_k < W:
        b_sum = b_sum.to(p_dweight.dtype.element_ty)
        tl.store(p_dweight + o_d * W + i_k, b_sum, mask=m_d)
    elif p_dbias is not None:
        tl.store(p_dbias + o_d, b_sum.to(p_dbias.dtype.element_ty), mask=m_d)
