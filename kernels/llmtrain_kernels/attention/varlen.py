"""torch.nn.attention.varlen: the FlashAttention-2 kernels inside torch, for packed documents.

Rows are flattened to one sequence of B*T tokens with boundaries cu_seqlens, so hidden pairs are
never computed. Dense rows with a window are the case of equal lengths. The function is young and
its arguments changed: 2.10 takes is_causal and neither scale nor window_size, 2.11 takes both and
expresses causality as window_size=(-1, 0), 2.12 wants enable_gqa said.
"""

from __future__ import annotations

import inspect
from operator import index

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llmtrain_kernels.attention.case import Case, flash_unsupported
from llmtrain_kernels.attention.widths import equal_widths

PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


def unsupported(case: Case) -> str | None:
    """Why this backend cannot run the case, or None."""
    if case.window is not None and "window_size" not in PARAMETERS:
        return f"torch {torch.__version__} has no window in varlen_attn; 2.11 has"
    if case.softcap:
        return "has no softcap"
    return flash_unsupported(case)


def flatten_rows(
    q_BTHK: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, int]:
    """Boundaries of the flattened tokens and the longest stretch; dense rows are cut at T."""
    if cu_seqlens is not None:
        return cu_seqlens, max_seqlen
    batch, tokens = q_BTHK.shape[:2]
    rows = torch.arange(batch + 1, dtype=torch.int32, device=q_BTHK.device)
    return rows * tokens, tokens


def flash_window(causal: bool, window: int | None) -> tuple[int, int]:
    """(left, right): how many keys before and after its own a query sees; -1 is unlimited."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


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
    """o_BTHV. Arguments as attention(); doc_ids_BT repeats cu_seqlens, positions are not taken."""
    boundaries, longest = flatten_rows(q_BTHK, cu_seqlens, max_seqlen)
    v_width = v_BSGV.shape[3]
    q_BTHK, k_BSGK, v_BSGV, scale = equal_widths(q_BTHK, k_BSGK, v_BSGV, scale)
    options = {}
    if "window_size" in PARAMETERS:
        options["window_size"] = flash_window(causal, window)
    else:
        options["is_causal"] = causal
    if "scale" in PARAMETERS:
        options["scale"] = scale
    elif scale is not None:
        q_BTHK = q_BTHK * (scale * q_BTHK.shape[-1] ** 0.5)  # it divides by sqrt(K) itself
    if "enable_gqa" in PARAMETERS:
        options["enable_gqa"] = index(q_BTHK.shape[2]) > index(k_BSGK.shape[2])
    o_NHV = varlen_attn(
        rearrange(q_BTHK, "b t h k -> (b t) h k"),
        rearrange(k_BSGK, "b s g k -> (b s) g k"),
        rearrange(v_BSGV, "b s g v -> (b s) g v"),
        boundaries,
        boundaries,
        longest,
        longest,
        **options,
    )
    return rearrange(o_NHV, "(b t) h v -> b t h v", b=q_BTHK.shape[0])[..., :v_width]
