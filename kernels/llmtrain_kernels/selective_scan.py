"""The selective scan of Mamba (S6): a diagonal recurrence whose every channel has K states.

    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t      h [D, K], elementwise; A < 0
    y_t = h_t C_t + skip * u_t                              channel d reads group d // (D / G)

Gu and Dao 2023, arXiv:2312.00752, eq. 2a and 2b, algorithm 2. `skip` is the paper's D. At a
document's first token h_{t-1} = 0. States and sums are float32 (float64 stays).

All states of a row are K times its inputs, too many to keep. The fast path goes through the row in
chunks, keeps the state before each, and in its backward pass makes a chunk's states again. Within a
chunk (scan_chunk), for spans of tokens at once:

    1. states of every span, as if zero stood before it, and the decay since the span's start
    2. the state before every span, one after the other
    3. what that state still is at each token, added

On a CPU a chunk is one span: its states stay in the cache, and steps 2 and 3 have nothing to do.

Cost: 4 D K FLOPs a token for the write and the read; the backward pass twice that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_state
from llmtrain_kernels.cost import Cost

BACKENDS = ("chunked", "reference")
SPAN = 16  # tokens of a span on a GPU: so many steps in a row, chunk / SPAN spans at once


def reference(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DK: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    skip_D: Tensor,
    *,
    initial_state_BDK: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, one token after the other. Products of states are matrix products, so that
    counted FLOPs are those of cost()."""
    dtype = torch.promote_types(u_BTD.dtype, torch.float32)
    (batch, tokens, width), (groups, k_width) = u_BTD.shape, b_BTGK.shape[2:]
    u, delta, A, b, c, skip = (
        z.to(dtype) for z in (u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, skip_D)
    )
    h_BDK = u.new_zeros(batch, width, k_width)
    if initial_state_BDK is not None:
        h_BDK = initial_state_BDK.to(dtype)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            same_B = doc_ids_BT[:, t] == doc_ids_BT[:, t - 1]
            h_BDK = torch.where(same_B[:, None, None], h_BDK, 0)
        # e: channels of a group
        written_BGe1 = rearrange(delta[:, t] * u[:, t], "b (g e) -> b g e 1", g=groups)
        write_BDK = rearrange(written_BGe1 @ b[:, t, :, None], "b g e k -> b (g e) k")
        h_BDK = (delta[:, t, :, None] * A).exp() * h_BDK + write_BDK
        read_BGe1 = rearrange(h_BDK, "b (g e) k -> b g e k", g=groups) @ c[:, t, :, :, None]
        outputs.append(rearrange(read_BGe1, "b g e 1 -> b (g e)") + skip * u[:, t])
    y_BTD = torch.stack(outputs, dim=1).to(u_BTD.dtype)
    return y_BTD, h_BDK if return_state else None


def decays(delta_BCD: Tensor, A_DK: Tensor, kept_BC: Tensor | None) -> Tensor:
    """exp(delta A) [B, C, D, K], zero at the tokens where kept_BC is 0: first ones of documents."""
    decay_BCDK = (delta_BCD[..., None] * A_DK).exp_()
    return decay_BCDK if kept_BC is None else decay_BCDK.mul_(kept_BC[:, :, None, None])


def scan_chunk(decay_BCDK: Tensor, h_BCDK: Tensor, before_BDK: Tensor, *, span: int) -> Tensor:
    """h_t = decay_t h_{t-1} + h_t for every t of a chunk, in place; `before` stands before it."""
    tokens = h_BCDK.shape[1]
    if span >= tokens or tokens % span:
        h_BDK = before_BDK
        for t in range(tokens):
            h_BDK = h_BCDK[:, t].addcmul_(decay_BCDK[:, t], h_BDK)
        return h_BCDK
    # n spans of c tokens; unflatten gives views, which the steps write through
    h_BNCDK = h_BCDK.unflatten(1, (-1, span))
    since_BNCDK = decay_BCDK.unflatten(1, (-1, span)).clone()
    for t in range(1, span):  # step 1
        h_BNCDK[:, :, t].addcmul_(since_BNCDK[:, :, t], h_BNCDK[:, :, t - 1])
        since_BNCDK[:, :, t].mul_(since_BNCDK[:, :, t - 1])
    before = [before_BDK]
    for n in range(tokens // span - 1):  # step 2
        before.append(torch.addcmul(h_BNCDK[:, n, -1], since_BNCDK[:, n, -1], before[-1]))
    h_BNCDK.addcmul_(since_BNCDK, torch.stack(before, dim=1)[:, :, None])  # step 3
    return h_BCDK


def span_of(x: Tensor) -> int:
    return SPAN if x.is_cuda else x.shape[1]


def grouped(z_BTD: Tensor, groups: int) -> Tensor:
    """Channels by group, with a last dimension for the states."""
    return rearrange(z_BTD, "b t (g e) -> b t g e 1", g=groups)


def writes(u_BCD: Tensor, delta_BCD: Tensor, b_BCGK: Tensor) -> Tensor:
    """(delta u) B [B, C, D, K]."""
    written = grouped(delta_BCD * u_BCD, b_BCGK.shape[2]) * b_BCGK[:, :, :, None]
    return rearrange(written, "b c g e k -> b c (g e) k")


def kept_tokens(doc_ids_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 at every token whose document has one before it in the row, 0 at first ones."""
    if doc_ids_BT is None:
        return None
    return F.pad(doc_ids_BT[:, 1:] == doc_ids_BT[:, :-1], (1, 0), value=True).to(dtype)


@torch.library.custom_op("llmtrain::selective_scan", mutates_args=())
def scan(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DK: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    initial_BDK: Tensor,
    doc_ids_BT: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_BTD without the skip, the last state, the states before each chunk [B, M, D, K]), all of
    the initial state's dtype."""
    dtype = initial_BDK.dtype
    groups, kept_BT = b_BTGK.shape[2], kept_tokens(doc_ids_BT, dtype)
    h_BDK, starts, outputs = initial_BDK, [], []
    for first in range(0, u_BTD.shape[1], chunk):
        now = slice(first, first + chunk)
        u, delta, b, c = (z[:, now].to(dtype) for z in (u_BTD, delta_BTD, b_BTGK, c_BTGK))
        kept_BC = None if kept_BT is None else kept_BT[:, now]
        starts.append(h_BDK)
        decay_BCDK = decays(delta, A_DK, kept_BC)
        h_BCDK = scan_chunk(decay_BCDK, writes(u, delta, b), h_BDK, span=span_of(u))
        split = rearrange(h_BCDK, "b c (g e) k -> b c g e k", g=groups)
        read = rearrange(split @ c[..., None], "b c g e 1 -> b c (g e)")
        outputs.append(read)
        h_BDK = h_BCDK[:, -1].clone()
    return torch.cat(outputs, dim=1), h_BDK, torch.stack(starts, dim=1)


@scan.register_fake
def _(u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, initial_BDK, doc_ids_BT, chunk):
    batch, tokens, _ = u_BTD.shape
    starts = initial_BDK.new_empty(batch, -(-tokens // chunk), *initial_BDK.shape[1:])
    return initial_BDK.new_empty(u_BTD.shape), torch.empty_like(initial_BDK), starts


@torch.library.custom_op("llmtrain::selective_scan_backward", mutates_args=())
def scan_backward(
    dy_BTD: Tensor,
    dlast_BDK: Tensor,
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DK: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    starts_BMDK: Tensor,
    doc_ids_BT: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, b, c and the initial state; chunks from last to first.

    With e_t the gradient of h_t:  e_t = dy_t C_t + exp(delta_{t+1} A) e_{t+1}
        d(delta u)_t = e_t . B_t      dB_t = sum_d e_t (delta u)_t     dC_t = sum_d dy_t h_t
        d(delta_t A) = e_t * (exp(delta_t A) h_{t-1}), of which delta_t and A have their shares
    """
    dtype = starts_BMDK.dtype
    groups, kept_BT = b_BTGK.shape[2], kept_tokens(doc_ids_BT, dtype)
    dA_DK, e_BDK = torch.zeros_like(A_DK, dtype=dtype), dlast_BDK.to(dtype)
    grads: list[tuple[Tensor, ...]] = []
    for m in reversed(range(starts_BMDK.shape[1])):
        now = slice(m * chunk, (m + 1) * chunk)
        dy, u, delta, b, c = (
            z[:, now].to(dtype) for z in (dy_BTD, u_BTD, delta_BTD, b_BTGK, c_BTGK)
        )
        kept_BC = None if kept_BT is None else kept_BT[:, now]
        decay_BCDK = decays(delta, A_DK, kept_BC)
        h_BCDK = scan_chunk(decay_BCDK, writes(u, delta, b), starts_BMDK[:, m], span=span_of(u))
        split = rearrange(h_BCDK, "b c (g e) k -> b c g e k", g=groups)
        dy_BCGe = rearrange(dy, "b c (g e) -> b c g e", g=groups)
        dc_BCGK = (dy_BCGe[:, :, :, None] @ split)[:, :, :, 0]
        e_BCDK = gradients_of_states(dy, c, decay_BCDK, e_BDK)
        split = rearrange(e_BCDK, "b c (g e) k -> b c g e k", g=groups)
        written_BCGe = rearrange(delta * u, "b c (g e) -> b c g e", g=groups)
        db_BCGK = (written_BCGe[:, :, :, None] @ split)[:, :, :, 0]
        dwritten_BCD = rearrange(split @ b[..., None], "b c g e 1 -> b c (g e)")
        e_BDK = decay_BCDK[:, 0] * e_BCDK[:, 0]  # for the chunk before
        # d(delta A) in place of the decays: e_t decay_t h_{t-1}
        dpower_BCDK = decay_BCDK.mul_(e_BCDK)
        dpower_BCDK[:, 1:].mul_(h_BCDK[:, :-1])
        dpower_BCDK[:, 0].mul_(starts_BMDK[:, m])
        ddelta_BCD = torch.einsum("bcdk,dk->bcd", dpower_BCDK, A_DK.to(dtype)) + dwritten_BCD * u
        dA_DK += torch.einsum("bcdk,bcd->dk", dpower_BCDK, delta)
        grads.append((dwritten_BCD * delta, ddelta_BCD, db_BCGK, dc_BCGK))
    du, ddelta, db, dc = (torch.cat(parts[::-1], dim=1) for parts in zip(*grads, strict=True))
    return (
        du.to(u_BTD.dtype),
        ddelta.to(delta_BTD.dtype),
        dA_DK.to(A_DK.dtype),
        db.to(b_BTGK.dtype),
        dc.to(c_BTGK.dtype),
        e_BDK,
    )


def gradients_of_states(
    dy_BCD: Tensor, c_BCGK: Tensor, decay_BCDK: Tensor, after_BDK: Tensor
) -> Tensor:
    """e_BCDK of a chunk; `after` is what reaches its last token from the next chunk.

    The recurrence backwards in time is a scan of the flipped chunk, with each decay one later.
    """
    e_BCDK = rearrange(
        grouped(dy_BCD, c_BCGK.shape[2]) * c_BCGK[:, :, :, None], "b c g e k -> b c (g e) k"
    )
    tokens, span = e_BCDK.shape[1], span_of(e_BCDK)
    e_BCDK[:, -1] += after_BDK
    if span >= tokens:  # one span needs no copies
        for t in reversed(range(tokens - 1)):
            e_BCDK[:, t].addcmul_(decay_BCDK[:, t + 1], e_BCDK[:, t + 1])
        return e_BCDK
    later_BCDK = F.pad(decay_BCDK[:, 1:].flip(1), (0, 0, 0, 0, 1, 0))
    return scan_chunk(later_BCDK, e_BCDK.flip(1), torch.zeros_like(after_BDK), span=span).flip(1)


@scan_backward.register_fake
def _(dy_BTD, dlast_BDK, u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, starts_BMDK, doc_ids_BT, chunk):
    inputs = (u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, starts_BMDK[:, 0])
    return tuple(z.new_empty(z.shape) for z in inputs)


def _setup_context(ctx, inputs, output):
    u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, _, doc_ids_BT, chunk = inputs
    ctx.save_for_backward(u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, output[2], doc_ids_BT)
    ctx.chunk = chunk


def _backward(ctx, dy_BTD, dlast_BDK, _):
    grads = scan_backward(dy_BTD, dlast_BDK, *ctx.saved_tensors, ctx.chunk)
    return (*grads, None, None)


scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DK: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    skip_D: Tensor,
    *,
    initial_state_BDK: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y_BTD in u's dtype, state_BDK in float32 (float64) or None).

    D is a multiple of G; channel d reads b and c of group d // (D / G). delta_BTD >= 0 and
    A_DK <= 0 are float32 (float64 with float64 inputs). initial_state_BDK: h before the first
    token, zeros if None. doc_ids_BT: integers that never fall along a row; a new one starts from
    h = 0. chunk: tokens whose states are held at once. backend: auto | chunked | reference.
    ValueError for shapes that do not fit, or an initial state together with documents.
    """
    check(u_BTD, delta_BTD, A_DK, b_BTGK, c_BTGK, skip_D, initial_state_BDK, doc_ids_BT)
    check_backend("selective_scan", backend, BACKENDS)
    if chunk < 1:
        raise ValueError(f"selective_scan: got chunk={chunk}, expected at least 1; set chunk")
    if backend == "reference":
        return reference(
            u_BTD,
            delta_BTD,
            A_DK,
            b_BTGK,
            c_BTGK,
            skip_D,
            initial_state_BDK=initial_state_BDK,
            doc_ids_BT=doc_ids_BT,
            return_state=return_state,
        )
    dtype = torch.promote_types(u_BTD.dtype, torch.float32)
    if initial_state_BDK is None:
        shape = (u_BTD.shape[0], *A_DK.shape)
        initial_state_BDK = torch.zeros(shape, dtype=dtype, device=u_BTD.device)
    y_BTD, state_BDK, _ = scan(
        u_BTD,
        delta_BTD,
        A_DK.to(dtype),
        b_BTGK,
        c_BTGK,
        initial_state_BDK.to(dtype),
        doc_ids_BT,
        chunk,
    )
    y_BTD = (y_BTD + skip_D.to(dtype) * u_BTD).to(u_BTD.dtype)
    return y_BTD, state_BDK if return_state else None


def check(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DK: Tensor,
    b_BTGK: Tensor,
    c_BTGK: Tensor,
    skip_D: Tensor,
    initial_state_BDK: Tensor | None,
    doc_ids_BT: Tensor | None,
) -> None:
    """ValueError when the tensors of selective_scan() do not fit together."""
    (batch, tokens, width), (groups, k_width) = u_BTD.shape, b_BTGK.shape[2:]
    if b_BTGK.shape != c_BTGK.shape or width % groups:
        raise ValueError(
            f"selective_scan: got b {tuple(b_BTGK.shape)} and c {tuple(c_BTGK.shape)} for {width} "
            "channels, expected one shape whose groups divide the channels; change the number of "
            "groups"
        )
    got = delta_BTD.shape, A_DK.shape, b_BTGK.shape[:2], skip_D.shape
    if got != (u_BTD.shape, (width, k_width), (batch, tokens), (width,)):
        raise ValueError(
            f"selective_scan: got delta {tuple(delta_BTD.shape)}, A {tuple(A_DK.shape)}, b "
            f"{tuple(b_BTGK.shape)} and skip {tuple(skip_D.shape)} for u {tuple(u_BTD.shape)}, "
            "expected u's rows, tokens and channels; give tensors of the same sizes"
        )
    check_state("selective_scan", initial_state_BDK, (batch, width, k_width), doc_ids_BT)


def cost(
    tokens: int, *, width: int, groups: int, k_width: int, dtype: torch.dtype, chunk: int = 64
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T): the write and the read, 2 K each a channel.

    The backward pass has a product for each of the gradients of u, b, c and h, and makes the states
    again. Saved besides the inputs: a state a chunk.
    """
    size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    inputs = tokens * (width * (size + wide) + 2 * groups * k_width * size)
    outputs = tokens * width * size
    forward = Cost(
        flops=4.0 * tokens * width * k_width,
        bytes_read=inputs,
        bytes_written=outputs,
        saved_bytes=inputs + -(-tokens // chunk) * width * k_width * wide,
    )
    backward = Cost(
        flops=2 * forward.flops,
        recomputed_flops=forward.flops / 2,
        bytes_read=inputs + outputs,
        bytes_written=inputs,
    )
    return forward, backward
