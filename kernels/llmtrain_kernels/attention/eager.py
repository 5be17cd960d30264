"""Attention written out: the scores of all pairs in memory, masked, then one softmax.

For what no fused kernel of the device computes: capped scores on the CPU or over a cache. All is
computed in at least float32, as in the reference; the scores take 4 H T S bytes a row.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.mask import visible_BTS


def unsupported(case: Case) -> str | None:
    """It runs everything."""
    return None


def run(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_positions_BT: Tensor | None = None,
    k_positions_BS: Tensor | None = None,
) -> Tensor:
    """o_BTHV. Arguments as attention(); cu_seqlens and max_seqlen repeat doc_ids_BT."""
    mask_BTS = visible_BTS(
        q_BTHK,
        k_BSGK,
        causal=causal,
        window=window,
        sinks=sinks,
        doc_ids_BT=doc_ids_BT,
        q_positions_BT=q_positions_BT,
        k_positions_BS=k_positions_BS,
    )
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    # r: the query heads that share one key/value group
    q_BGrTK = rearrange(scale * q_BTHK.to(dtype), "b t (g r) k -> b g r t k", g=k_BSGK.shape[2])
    k_BG1SK = rearrange(k_BSGK.to(dtype), "b s g k -> b g 1 s k")
    v_BG1SV = rearrange(v_BSGV.to(dtype), "b s g v -> b g 1 s v")
    s_BGrTS = q_BGrTK @ k_BG1SK.mT
    if softcap is not None:
        s_BGrTS = softcap * torch.tanh(s_BGrTS / softcap)
    s_BGrTS = s_BGrTS.masked_fill(~mask_BTS[:, None, None], float("-inf"))
    o_BGrTV = s_BGrTS.softmax(dim=-1) @ v_BG1SV
    return rearrange(o_BGrTV, "b g r t v -> b t (g r) v").to(q_BTHK.dtype)
