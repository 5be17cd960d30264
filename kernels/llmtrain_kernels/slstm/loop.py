"""The sLSTM as torch operations with few launches a token, on any device.

11 launches a token forward and 7 backward (one more each with documents): results go into buffers
made before, gates lie side by side, so that one operation serves several, and all that the backward
pass needs of the forward's values is formed for many tokens at once. The gradient of R is one
matrix product a block of tokens. The stabiliser is a constant there: c / n does not depend on it.

Saved: c, n, m, h and x, 8 H V numbers a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from llmtrain_kernels.slstm.reference import LOG_FORGET_MAX, State

BLOCK = 128  # tokens whose coefficients the backward pass forms at once


@torch.library.custom_op("llmtrain::slstm_forward", mutates_args=())
def forward(
    x_THBX: Tensor,
    r_HVX: Tensor,
    state_4HBV: Tensor,
    keep_TB: Tensor | None,
    exponential: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_THBV, the last (h, c, n, m) [4, H, B, V], and c and n [S, H, B, 2, V] and m [S, H, B, V]
    before every token and after the last, S = T + 1; unless save, S = 1 and only the last).

    x: f's slot is -inf where a document starts. keep_TB: 0 there, else 1.
    """
    tokens, heads, batch, _ = x_THBX.shape
    v_width = r_HVX.shape[1]
    slots = tokens + 1 if save else 1
    h_THBV = x_THBX.new_empty(tokens, heads, batch, v_width)
    s_SHB2V = x_THBX.new_empty(slots, heads, batch, 2, v_width)
    m_SHBV = x_THBX.new_empty(slots, heads, batch, v_width)
    s_SHB2V[0] = state_4HBV[1:3].movedim(0, 2)
    m_SHBV[0] = state_4HBV[3]
    h, s, m = state_4HBV[0], s_SHB2V[0], m_SHBV[0]
    gates = x_THBX.new_empty(heads, batch, 4, v_width)
    flat, i, f, f_o = gates.flatten(2), gates[:, :, 1], gates[:, :, 2], gates[:, :, 2:]
    log_gates = gates[:, :, 3] if exponential else f_o
    i_f, i_f_o, i_1, f_1 = gates[:, :, 1:3], gates[:, :, 1:], i[:, :, None], f[:, :, None]
    written = x_THBX.new_ones(heads, batch, 2, v_width)  # what i writes into c and n: z and 1
    z = written[:, :, 0]
    h_list, s_list, m_list = h_THBV.unbind(), s_SHB2V.unbind(), m_SHBV.unbind()
    keeps = None if keep_TB is None else keep_TB[:, None, :, None].unbind()
    for t, x in enumerate(x_THBX.unbind()):
        if keeps is not None:
            h = h * keeps[t]
        torch.baddbmm(x, h, r_HVX, out=flat)
        if t == 0:
            f.masked_fill_(s[:, :, 1] == 0, float("-inf"))
        if exponential:
            f.clamp_(max=LOG_FORGET_MAX)
        torch.ops.aten.log_sigmoid.out(log_gates, out=log_gates)
        torch.tanh(gates[:, :, 0], out=z)
        f.add_(m)
        m = m_list[t + 1] if save else m
        torch.maximum(f, i, out=m)
        i_f.sub_(m[:, :, None])
        i_f_o.exp_()
        s = torch.mul(s, f_1, out=s_list[t + 1] if save else s)
        s.addcmul_(i_1, written)
        h = torch.div(s[:, :, 0], s[:, :, 1], out=h_list[t])
        h.mul_(gates[:, :, 3])
    last_4HBV = torch.stack([h, s[:, :, 0], s[:, :, 1], m])
    return h_THBV, last_4HBV, s_SHB2V, m_SHBV


@forward.register_fake
def _(x_THBX, r_HVX, state_4HBV, keep_TB, exponential, save):
    tokens, heads, batch, _ = x_THBX.shape
    v_width, slots = r_HVX.shape[1], tokens + 1 if save else 1
    return (
        x_THBX.new_empty(tokens, heads, batch, v_width),
        torch.empty_like(state_4HBV),
        x_THBX.new_empty(slots, heads, batch, 2, v_width),
        x_THBX.new_empty(slots, heads, batch, v_width),
    )


@torch.library.custom_op("llmtrain::slstm_backward", mutates_args=())
def backward(
    dh_THBV: Tensor,
    dlast_4HBV: Tensor,
    x_THBX: Tensor,
    r_HVX: Tensor,
    h0_HBV: Tensor,
    h_THBV: Tensor,
    s_SHB2V: Tensor,
    m_SHBV: Tensor,
    keep_TB: Tensor | None,
    exponential: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_THBX, dr_HVX, dstate_4HBV). Blocks of tokens from the last to the first."""
    tokens, v_width = x_THBX.shape[0], r_HVX.shape[1]
    dx_THBX, dr_HVX = torch.empty_like(x_THBX), torch.zeros_like(r_HVX)
    r_HXV = r_HVX.mT
    before_THBV = torch.cat([h0_HBV[None], h_THBV[:-1]])
    if keep_TB is not None:
        before_THBV = before_THBV * keep_TB[:, None, :, None]
    dh = dh_THBV[-1] + dlast_4HBV[0]
    ds_HB2V = dlast_4HBV[1:3].movedim(0, 2).clone(memory_format=torch.contiguous_format)
    u = torch.empty_like(dh)
    for first in range((tokens - 1) // BLOCK * BLOCK, -1, -BLOCK):
        span = slice(first, min(first + BLOCK, tokens))
        coefficients = block_coefficients(
            einsum(before_THBV[span], r_HVX, "t h b v, h v x -> t h b x") + x_THBX[span],
            s_SHB2V[first : span.stop + 1],
            m_SHBV[first : span.stop + 1],
            first_block=first == 0,
            exponential=exponential,
        )
        for t, (to_o, to_u, to_s, by_c, by_n, f) in zip(
            range(span.stop - 1, first - 1, -1), zip(*(z.flip(0).unbind() for z in coefficients))
        ):
            dx = dx_THBX[t]
            dx_slots = dx.unflatten(-1, (4, v_width))
            torch.mul(dh, to_o, out=dx_slots[:, :, 3])
            torch.mul(dh, to_u, out=u)
            ds_HB2V.addcmul_(u[:, :, None], to_s)
            torch.mul(by_c, ds_HB2V[:, :, :1], out=dx_slots[:, :, :3])
            dx_slots[:, :, 1:3].addcmul_(by_n, ds_HB2V[:, :, 1:])
            ds_HB2V.mul_(f)
            if keep_TB is not None:
                before, keep = torch.bmm(dx, r_HXV), keep_TB[t, None, :, None]
                dh = torch.addcmul(dh_THBV[t - 1], before, keep) if t > 0 else before * keep
            else:
                dh = torch.baddbmm(dh_THBV[t - 1], dx, r_HXV) if t > 0 else torch.bmm(dx, r_HXV)
        dr_HVX += einsum(before_THBV[span], dx_THBX[span], "t h b v, t h b x -> h v x")
    dm = (ds_HB2V * s_SHB2V[0]).sum(dim=2)
    return dx_THBX, dr_HVX, torch.stack([dh, ds_HB2V[:, :, 0], ds_HB2V[:, :, 1], dm])


def block_coefficients(
    gates_THBX: Tensor, s_SHB2V: Tensor, m_SHBV: Tensor, *, first_block: bool, exponential: bool
) -> tuple[Tensor, ...]:
    """What the gradients of a token are multiplied with, for a block of tokens. With u the gradient
    of c / n and dc, dn those of the state, the gradients of the pre-activations are

        do~ = dh (c / n) o (1 - o)      u = dh o,   dc += u / n,   dn -= u c / n^2
        dz~ = dc i (1 - z^2)            di~ = i (dc z + dn)
        df~ = f (d log f / d f~) (dc c_{t-1} + dn n_{t-1})
    """
    z, i, f, o = gates_THBX.unflatten(-1, (4, -1)).unbind(-2)
    if first_block:
        fresh = torch.zeros_like(f, dtype=torch.bool)
        fresh[0] = s_SHB2V[0, :, :, 1] == 0
        f = f.masked_fill(fresh, float("-inf"))
    log_f = f.clamp(max=LOG_FORGET_MAX) if exponential else F.logsigmoid(f)
    slope = (f <= LOG_FORGET_MAX).to(f.dtype) if exponential else (-f).sigmoid()
    # <= 0 but for the rounding of a second computation, which huge gates would magnify
    write = (i - m_SHBV[1:]).clamp(max=0).exp()
    keep = (log_f + m_SHBV[:-1] - m_SHBV[1:]).clamp(max=0).exp()
    z, o = z.tanh(), o.sigmoid()
    c, n = s_SHB2V[1:].unbind(-2)
    ratio = c / n
    return (
        ratio * o * (1 - o),
        o / n,
        torch.stack([torch.ones_like(ratio), -ratio], dim=-2),
        torch.stack([write * (1 - z * z), write * z, keep * slope * s_SHB2V[:-1, ..., 0, :]], -2),
        torch.stack([write, keep * slope * s_SHB2V[:-1, ..., 1, :]], dim=-2),
        keep[..., None, :],
    )


@backward.register_fake
def _(dh_THBV, dlast_4HBV, x_THBX, r_HVX, h0_HBV, h_THBV, s_SHB2V, m_SHBV, keep_TB, exponential):
    return torch.empty_like(x_THBX), torch.empty_like(r_HVX), torch.empty_like(dlast_4HBV)


def setup_context(ctx, inputs, output) -> None:
    x_THBX, r_HVX, state_4HBV, keep_TB, ctx.exponential, _ = inputs
    h_THBV, _, s_SHB2V, m_SHBV = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_THBX, r_HVX, state_4HBV[0], h_THBV, s_SHB2V, m_SHBV, keep_TB)


def gradients(ctx, dh_THBV, dlast_4HBV, ds_SHB2V, dm_SHBV):
    """Of forward(). c, n and m before every token are for this function only."""
    *saved, keep_TB = ctx.saved_tensors
    h_THBV = saved[3]
    if dh_THBV is None:
        dh_THBV = torch.zeros_like(h_THBV)
    if dlast_4HBV is None:
        dlast_4HBV = h_THBV.new_zeros(4, *h_THBV.shape[1:])
    dx_THBX, dr_HVX, dstate_4HBV = backward(
        dh_THBV.contiguous(), dlast_4HBV, *saved, keep_TB, ctx.exponential
    )
    return dx_THBX, dr_HVX, dstate_4HBV, None, None, None


forward.register_autograd(gradients, setup_context=setup_context)


def loop(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    *,
    forget_gate: str = "sigmoid",
    initial_state: State | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The same with few launches a token. Arguments as slstm()."""
    dtype = torch.promote_types(x_BTHX.dtype, torch.float32)
    batch, _, heads, _ = x_BTHX.shape
    v_width = r_HVX.shape[1]
    x_THBX = rearrange(x_BTHX.to(dtype), "b t h x -> t h b x").contiguous()
    keep_TB = None
    if doc_ids_BT is not None:
        starts_BT = F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 0), value=True)
        keep_TB = rearrange(~starts_BT, "b t -> t b").to(dtype).contiguous()
        z_i, f, o = x_THBX.split([2 * v_width, v_width, v_width], dim=-1)
        f = f.masked_fill(keep_TB[:, None, :, None] == 0, float("-inf"))
        x_THBX = torch.cat([z_i, f, o], dim=-1)
    if initial_state is None:
        state_4HBV = x_THBX.new_zeros(4, heads, batch, v_width)
    else:
        state_4HBV = rearrange(list(initial_state), "s b h v -> s h b v").to(dtype).contiguous()
    leaves = (x_BTHX, r_HVX, state_4HBV)
    save = torch.is_grad_enabled() and any(z.requires_grad for z in leaves)
    h_THBV, last_4HBV, _, _ = forward(
        x_THBX, r_HVX.to(dtype).contiguous(), state_4HBV, keep_TB, forget_gate == "exp", save
    )
    h_BTHV = rearrange(h_THBV, "t h b v -> b t h v").to(x_BTHX.dtype)
    if not return_state:
        return h_BTHV, None
    h, c, n, m = rearrange(last_4HBV, "s h b v -> s b h v")
    return h_BTHV, (h, c, n, m.detach())
