"""The sLSTM as two Triton kernels that walk through all tokens (kernels.py).

Saved for the backward pass: tanh z, o, the exponent of the gates i and f, the slope of log f, c, n
and h: 7 H V numbers a token. Their chain needs one product with R a token, forward and backward.
The gradient of R is made of matrix products of many tokens, outside of the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.slstm.reference import State

WARPS = {16: 1, 32: 4, 64: 8, 128: 8}  # of a program, by V
RESIDENT = 64  # the widest V whose R stays in registers
LOW = 2.0**11  # as in kernels.py
BLOCK = 512  # pairs of rows and tokens in a matrix product for the gradient of R


def arranged(r_HGKN: Tensor, warps: int) -> tuple[Tensor, Tensor]:
    """(hi and lo in float16, side by side in the order that kernels.arranged_matrix() reads, and
    the power of two [H] that both are to be multiplied with)."""
    _, exponent_H = torch.frexp(r_HGKN.abs().amax(dim=(1, 2, 3)))
    scale_H = torch.ldexp(torch.ones_like(r_HGKN[:, 0, 0, 0]), exponent_H.clamp(-125, 126))
    small_HGKN = r_HGKN / scale_H[:, None, None, None]
    hi_HGKN = small_HGKN.half()
    lo_HGKN = ((small_HGKN - hi_HGKN.float()) * LOW).half()
    r_HG2KN = torch.stack([hi_HGKN, lo_HGKN], dim=2)
    pairs = 2 if r_HG2KN.shape[-1] >= 32 else 1
    order = "h g s (k p a q b) (c w n) -> h g s c k w n q p a b"
    sizes = {"p": pairs, "a": 2, "q": 4, "b": 2, "w": warps, "n": 8}
    return rearrange(r_HG2KN, order, **sizes).contiguous(), scale_H


def launch_options(v_width: int, starts_BS: Tensor | None) -> dict[str, int | bool]:
    """What both kernels are compiled for. One stage: Triton's own pipelining would bring R to
    shared memory, which is too small for it."""
    return {
        "V": v_width,
        "W": WARPS[v_width],
        "DOCUMENTS": starts_BS is not None,
        "RESIDENT": v_width <= RESIDENT,
        "num_warps": WARPS[v_width],
        "num_stages": 1,
    }


@torch.library.custom_op("llmtrain::slstm_persistent_forward", mutates_args=())
def forward(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    state_4BHV: Tensor,
    starts_BS: Tensor | None,
    exponential: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(h_BTHV, the last (h, c, n, m) [4, B, H, V], and what the backward kernel reads: gates
    [B, T, H, 4, V] with c and n [B, T + 1, H, 2, V], empty unless save).

    All float32 and contiguous. starts_BS: bool [B, T + 1], whether a document starts there.
    """
    from llmtrain_kernels.slstm.kernels import ROWS, slstm_fwd_kernel

    assert all(z.is_contiguous() and z.dtype == torch.float32 for z in (x_BTHX, state_4BHV))
    batch, tokens, heads, _ = x_BTHX.shape
    v_width = r_HVX.shape[1]
    h_BTHV, last_4BHV, gates_BTH4V, memory_BSH2V = outputs(x_BTHX, v_width, save)
    r_arranged, scale_H = arranged(rearrange(r_HVX, "h k (g n) -> h g k n", g=4), WARPS[v_width])
    with torch.cuda.device_of(x_BTHX):
        slstm_fwd_kernel[(-(-batch // ROWS.value), heads)](
            x_BTHX,
            r_arranged,
            scale_H,
            state_4BHV,
            starts_BS,
            h_BTHV,
            last_4BHV,
            gates_BTH4V,
            memory_BSH2V,
            batch,
            tokens,
            heads,
            EXPONENTIAL=exponential,
            SAVE=save,
            **launch_options(v_width, starts_BS),
        )
    return h_BTHV, last_4BHV, gates_BTH4V, memory_BSH2V


def outputs(x_BTHX: Tensor, v_width: int, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, heads, _ = x_BTHX.shape
    rows = batch if save else 0
    return (
        x_BTHX.new_empty(batch, tokens, heads, v_width),
        x_BTHX.new_empty(4, batch, heads, v_width),
        x_BTHX.new_empty(rows, tokens, heads, 4, v_width),
        x_BTHX.new_empty(rows, tokens + 1, heads, 2, v_width),
    )


@forward.register_fake
def _(x_BTHX, r_HVX, state_4BHV, starts_BS, exponential, save):
    return outputs(x_BTHX, r_HVX.shape[1], save)


@torch.library.custom_op("llmtrain::slstm_persistent_backward", mutates_args=())
def backward(
    dh_BTHV: Tensor,
    dlast_3BHV: Tensor,
    r_HVX: Tensor,
    h0_BHV: Tensor,
    h_BTHV: Tensor,
    gates_BTH4V: Tensor,
    memory_BSH2V: Tensor,
    starts_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_BTHX, dr_HVX, dstate_4BHV)."""
    from llmtrain_kernels.slstm.kernels import ROWS, slstm_bwd_kernel

    assert all(z.is_contiguous() and z.dtype == torch.float32 for z in (dh_BTHV, dlast_3BHV))
    batch, tokens, heads, v_width = h_BTHV.shape
    dx_BTHX = h_BTHV.new_empty(batch, tokens, heads, 4 * v_width)
    dstate_4BHV = h_BTHV.new_empty(4, batch, heads, v_width)
    r_arranged, scale_H = arranged(rearrange(r_HVX, "h n (g k) -> h g k n", g=4), WARPS[v_width])
    with torch.cuda.device_of(h_BTHV):
        slstm_bwd_kernel[(-(-batch // ROWS.value), heads)](
            dh_BTHV,
            dlast_3BHV,
            r_arranged,
            scale_H,
            gates_BTH4V,
            memory_BSH2V,
            starts_BS,
            dx_BTHX,
            dstate_4BHV,
            batch,
            tokens,
            heads,
            **launch_options(v_width, starts_BS),
        )
    dstate_4BHV[3] = (rearrange(dstate_4BHV[1:3], "s b h v -> b h s v") * memory_BSH2V[:, 0]).sum(2)
    before_BTHV = torch.cat([h0_BHV[:, None], h_BTHV[:, :-1]], dim=1)
    if starts_BS is not None:
        before_BTHV.masked_fill_(starts_BS[:, :-1, None, None], 0)
    return dx_BTHX, outer_products(before_BTHV, dx_BTHX), dstate_4BHV


@backward.register_fake
def _(dh_BTHV, dlast_3BHV, r_HVX, h0_BHV, h_BTHV, gates_BTH4V, memory_BSH2V, starts_BS):
    batch, tokens, heads, v_width = h_BTHV.shape
    return (
        h_BTHV.new_empty(batch, tokens, heads, 4 * v_width),
        torch.empty_like(r_HVX, memory_format=torch.contiguous_format),
        h_BTHV.new_empty(4, batch, heads, v_width),
    )


def outer_products(before_BTHV: Tensor, dx_BTHX: Tensor) -> Tensor:
    """sum over rows and tokens of before^T dx, [H, V, X]. In blocks, because one product would
    occupy few of a GPU's processors, and head by head, because then nothing is copied."""
    pairs = before_BTHV.shape[0] * before_BTHV.shape[1]
    whole = pairs // BLOCK * BLOCK
    sums = []
    for before_BTV, dx_BTX in zip(before_BTHV.unbind(2), dx_BTHX.unbind(2)):
        before_PV, dx_PX = before_BTV.flatten(0, 1), dx_BTX.flatten(0, 1)
        before_MCV, dx_MCX = (z[:whole].unflatten(0, (-1, BLOCK)) for z in (before_PV, dx_PX))
        sums.append((before_MCV.mT @ dx_MCX).sum(0) + before_PV[whole:].mT @ dx_PX[whole:])
    return torch.stack(sums)


def setup_context(ctx, inputs, output) -> None:
    _, r_HVX, state_4BHV, starts_BS, _, _ = inputs
    h_BTHV, _, gates_BTH4V, memory_BSH2V = output
    ctx.set_materialize_grads(False)
    saved = (r_HVX, state_4BHV[0], h_BTHV, gates_BTH4V, memory_BSH2V, starts_BS)
    ctx.save_for_backward(*saved)


def gradients(ctx, dh_BTHV, dlast_4BHV, dgates_BTH4V, dmemory_BSH2V):
    """Of forward(). What it saves is for this function only; the last m is a constant."""
    saved = ctx.saved_tensors
    h_BTHV = saved[2]
    if dh_BTHV is None:
        dh_BTHV = torch.zeros_like(h_BTHV)
    if dlast_4BHV is None:
        dlast_4BHV = h_BTHV.new_zeros(4, *h_BTHV[:, 0].shape)
    dlast_3BHV = dlast_4BHV[:3].contiguous()
    dx_BTHX, dr_HVX, dstate_4BHV = backward(dh_BTHV.contiguous(), dlast_3BHV, *saved)
    return dx_BTHX, dr_HVX, dstate_4BHV, None, None, None


forward.register_autograd(gradients, setup_context=setup_context)


def persistent(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    *,
    forget_gate: str = "sigmoid",
    initial_state: State | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The same with one launch for all tokens. Arguments as slstm()."""
    batch, _, heads, _ = x_BTHX.shape
    starts_BS = None
    if doc_ids_BT is not None:
        starts_BS = F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 1))
    if initial_state is None:
        state_4BHV = x_BTHX.new_zeros(4, batch, heads, r_HVX.shape[1], dtype=torch.float32)
    else:
        state_4BHV = torch.stack([z.float() for z in initial_state])
    leaves = (x_BTHX, r_HVX, state_4BHV)
    save = torch.is_grad_enabled() and any(z.requires_grad for z in leaves)
    h_BTHV, last_4BHV, _, _ = forward(
        x_BTHX.float().contiguous(),
        r_HVX.float().contiguous(),
        state_4BHV,
        starts_BS,
        forget_gate == "exp",
        save,
    )
    h_BTHV = h_BTHV.to(x_BTHX.dtype)
    if not return_state:
        return h_BTHV, None
    h, c, n, m = last_4BHV
    return h_BTHV, (h, c, n, m.detach())
