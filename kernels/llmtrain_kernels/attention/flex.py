"""torch.nn.attention.flex_attention: a Triton kernel generated from the mask's formula.

Dong et al. 2024, arXiv:2412.05496. Blocks in which the mask hides everything are skipped. Without
compilation it would materialise the scores, so outside of torch.compile it is compiled here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import index

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.mask import document_positions


def unsupported(case: Case) -> str | None:
    """Why this backend cannot run the case, or None."""
    if case.cache:
        return "is not used for reading a cache"
    if case.device == "cpu" and case.training:
        return "has no backward pass on the CPU"
    if case.dtype == torch.float64 and case.device != "cpu":
        return "has no float64 kernel"
    if case.device == "cuda" and min(case.k_width, case.v_width) < 16:
        return f"needs widths of at least 16, not {case.k_width} and {case.v_width}"
    return None


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    doc_ids_BT: Tensor | None,
    causal: bool,
    window: int | None,
    sinks: int,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """The block mask and the attention, as one function to compile."""
    packed_sinks = sinks > 0 and doc_ids_BT is not None
    positions_BT = document_positions(doc_ids_BT) if packed_sinks else None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = i >= j if causal else i >= 0
        if window is not None:
            near = (i - j).abs() < window
            if sinks:
                near = near | ((j if positions_BT is None else positions_BT[b, j]) < sinks)
            shown = shown & near
        if doc_ids_BT is not None:
            shown = shown & (doc_ids_BT[b, i] == doc_ids_BT[b, j])
        return shown

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    batch, tokens = q_BHTK.shape[0], q_BHTK.shape[2]
    block_mask = create_block_mask(
        visible,
        None if doc_ids_BT is None else batch,
        None,
        tokens,
        tokens,
        device=q_BHTK.device,
    )
    return flex_attention(
        q_BHTK,
        k_BGSK,
        v_BGSV,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=index(q_BHTK.shape[1]) > index(k_BGSK.shape[1]),
    )


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """One kernel a shape: with sizes left open, torch 2.11 cannot lower the block mask's code."""
    return torch.compile(attend, fullgraph=True, dynamic=False)


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
    if torch.compiler.is_compiling() or not q_BTHK.is_cuda:
        attention = attend
    else:
        attention = compiled()
    o_BHTV = attention(
        rearrange(q_BTHK, "b t h k -> b h t k"),
        rearrange(k_BSGK, "b s g k -> b g s k"),
        rearrange(v_BSGV, "b s g v -> b g s v"),
        doc_ids_BT,
        causal,
        window,
        sinks,
        softcap,
        scale,
    )
    return rearrange(o_BHTV, "b h t v -> b t h v")
