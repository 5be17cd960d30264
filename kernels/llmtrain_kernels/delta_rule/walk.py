"""The one sequential part of the chunked delta rule: the state, from chunk to chunk.

    U_m     = V_m - W_m S_m              V_m, W_m: what the chunk would write, and read, on its own
    S_{m+1} = decay_m S_m + K_m^T U_m    K_m: keys, decayed to the chunk's end

Its gradients, with G_m that of S_{m+1}, from the last chunk to the first:

    dV_m = dU_m + K_m G_m                       dW_m = -dV_m S_m^T
    G_{m-1} = decay_m G_m + dS_m - W_m^T dV_m   dK_m = U_m G_m^T      d decay_m = <S_m, G_m>

An operator of its own, so that what torch.compile sees does not grow with the number of chunks.
W S is a product in W's dtype; the others, the corrections, the state and all gradients are in V's
(float32; float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("llmtrain_kernels::delta_rule_walk", mutates_args=())
def walk(
    w_MNCK: Tensor, v_MNCV: Tensor, k_MNCK: Tensor, decay_MN: Tensor, state_NKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(u_MNCV, the state before every chunk [M, N, K, V] in w's dtype, the last state [N, K, V]).

    N: rows and heads together. w may be of a lower dtype than the others.
    """
    u_MNCV = torch.empty_like(v_MNCV)
    states_MNKV = w_MNCK.new_empty(len(w_MNCK), *state_NKV.shape)
    S_NKV = state_NKV.clone()
    for m in range(len(w_MNCK)):
        states_MNKV[m] = S_NKV
        torch.sub(v_MNCV[m], w_MNCK[m] @ states_MNKV[m], out=u_MNCV[m])
        S_NKV.mul_(decay_MN[m, :, None, None]).baddbmm_(k_MNCK[m].mT, u_MNCV[m])
    return u_MNCV, states_MNKV, S_NKV


@walk.register_fake
def _(
    w_MNCK: Tensor, v_MNCV: Tensor, k_MNCK: Tensor, decay_MN: Tensor, state_NKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states_MNKV = w_MNCK.new_empty(w_MNCK.shape[0], *state_NKV.shape)
    return torch.empty_like(v_MNCV), states_MNKV, torch.empty_like(state_NKV)


@torch.library.custom_op("llmtrain_kernels::delta_rule_walk_backward", mutates_args=())
def walk_backward(
    du_MNCV: Tensor,
    dstates_MNKV: Tensor,
    dlast_NKV: Tensor,
    w_MNCK: Tensor,
    k_MNCK: Tensor,
    decay_MN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv_MNCV, G of every chunk [M, N, K, V], the first state's gradient [N, K, V])."""
    dv_MNCV = torch.empty_like(du_MNCV)
    ends_MNKV = torch.empty_like(dstates_MNKV, dtype=dlast_NKV.dtype)
    G_NKV = dlast_NKV.clone()
    for m in reversed(range(len(w_MNCK))):
        ends_MNKV[m] = G_NKV
        torch.baddbmm(du_MNCV[m], k_MNCK[m], ends_MNKV[m], out=dv_MNCV[m])
        G_NKV.mul_(decay_MN[m, :, None, None]).add_(dstates_MNKV[m])
        G_NKV.baddbmm_(w_MNCK[m].mT.to(G_NKV.dtype), dv_MNCV[m], alpha=-1)
    return dv_MNCV, ends_MNKV, G_NKV


@walk_backward.register_fake
def _(
    du_MNCV: Tensor,
    dstates_MNKV: Tensor,
    dlast_NKV: Tensor,
    w_MNCK: Tensor,
    k_MNCK: Tensor,
    decay_MN: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    ends_MNKV = torch.empty_like(dstates_MNKV, dtype=dlast_NKV.dtype)
    return torch.empty_like(du_MNCV), ends_MNKV, torch.empty_like(dlast_NKV)


def keep(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    w_MNCK, _, k_MNCK, decay_MN, _ = inputs
    u_MNCV, states_MNKV, _ = output
    ctx.save_for_backward(w_MNCK, k_MNCK, decay_MN, u_MNCV, states_MNKV)


def differentiate(
    ctx, du_MNCV: Tensor, dstates_MNKV: Tensor, dlast_NKV: Tensor
) -> tuple[Tensor, ...]:
    w_MNCK, k_MNCK, decay_MN, u_MNCV, states_MNKV = ctx.saved_tensors
    dv_MNCV, ends_MNKV, dstate_NKV = walk_backward(
        du_MNCV.contiguous(), dstates_MNKV.contiguous(), dlast_NKV, w_MNCK, k_MNCK, decay_MN
    )
    states_MNKV = states_MNKV.to(ends_MNKV.dtype)
    dw_MNCK = -(dv_MNCV @ states_MNKV.mT).to(w_MNCK.dtype)
    dk_MNCK = u_MNCV @ ends_MNKV.mT
    ddecay_MN = (states_MNKV * ends_MNKV).sum(dim=(-1, -2))
    return dw_MNCK, dv_MNCV, dk_MNCK, ddecay_MN, dstate_NKV


walk.register_autograd(differentiate, setup_context=keep)
