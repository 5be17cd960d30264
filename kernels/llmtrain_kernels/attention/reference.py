"""Softmax attention by definition, one query token after the other; the truth for every backend.

    s_j = scale * q_t . k_j          over the keys j visible to query t
    s_j = c tanh(s_j / c)            with softcap c only
    o_t = sum_j softmax(s)_j v_j     query head h reads key/value group h // (H / G)

Vaswani et al. 2017, arXiv:1706.03762, eq. 1. Inputs are cast to float32 (float64 stays) and the
result is rounded once, at the end. Keys that the causal mask or the window hides are never
multiplied, so counted FLOPs are exactly those of costs.py; documents and caches are masked.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.attention.mask import visible_BTS


def unsupported(case: object) -> str | None:
    """The reference runs everything."""
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
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    tokens, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    # r: the query heads that share one key/value group
    q_BTGrK = rearrange(q_BTHK.to(dtype), "b t (g r) k -> b t g r k", g=k_BSGK.shape[2])
    k_BGSK = rearrange(k_BSGK.to(dtype), "b s g k -> b g s k")
    v_BGSV = rearrange(v_BSGV.to(dtype), "b s g v -> b g s v")
    mask_BTS = None
    if doc_ids_BT is not None or k_positions_BS is not None:
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
    outputs = []
    for t in range(tokens):
        first, end = 0, keys
        if k_positions_BS is None:
            end = t + 1 if causal else keys
            if window is not None:
                first, end = max(0, t - window + 1), min(end, t + window)
        if mask_BTS is not None and sinks:
            first = 0  # a document may start anywhere
        sunk = min(sinks, first)
        s_BGrS = scale * q_BTGrK[:, t] @ stretch(k_BGSK, sunk, first, end).mT
        if softcap is not None:
            s_BGrS = softcap * torch.tanh(s_BGrS / softcap)
        if mask_BTS is not None:
            hidden_BS = ~mask_BTS[:, t, first:end]
            s_BGrS = s_BGrS.masked_fill(hidden_BS[:, None, None], float("-inf"))
        outputs.append(s_BGrS.softmax(dim=-1) @ stretch(v_BGSV, sunk, first, end))
    o_BTHV = rearrange(outputs, "t b g r v -> b t (g r) v")
    return o_BTHV.to(q_BTHK.dtype)


def stretch(x_BGSK: Tensor, sunk: int, first: int, end: int) -> Tensor:
    """Keys or values [0, sunk) and [first, end)."""
    near = x_BGSK[:, :, first:end]
    return near if sunk == 0 else torch.cat([x_BGSK[:, :, :sunk], near], dim=2)
