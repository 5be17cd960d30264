"""The flash-attn package (optional extra): FlashAttention-2, Dao 2023, arXiv:2307.08691."""

from __future__ import annotations

from importlib.util import find_spec

from einops import rearrange
from torch import Tensor

from llmtrain_kernels.attention.case import Case, flash_unsupported
from llmtrain_kernels.attention.varlen import flash_window, flatten_rows
from llmtrain_kernels.attention.widths import equal_widths

INSTALLED = find_spec("flash_attn") is not None


def unsupported(case: Case) -> str | None:
    """Why this backend cannot run the case, or None."""
    if not INSTALLED:
        return "is not installed: pip install 'llmtrain[flash-attn]'"
    return flash_unsupported(case)


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
    from flash_attn import flash_attn_varlen_func  # optional, and slow to import

    boundaries, longest = flatten_rows(q_BTHK, cu_seqlens, max_seqlen)
    v_width = v_BSGV.shape[3]
    q_BTHK, k_BSGK, v_BSGV, scale = equal_widths(q_BTHK, k_BSGK, v_BSGV, scale)
    o_NHV = flash_attn_varlen_func(
        rearrange(q_BTHK, "b t h k -> (b t) h k"),
        rearrange(k_BSGK, "b s g k -> (b s) g k"),
        rearrange(v_BSGV, "b s g v -> (b s) g v"),
        boundaries,
        boundaries,
        longest,
        longest,
        softmax_scale=scale,
        causal=causal,
        softcap=0.0 if softcap is None else softcap,
        window_size=flash_window(causal, window) if window is not None else (-1, -1),
    )
    return rearrange(o_NHV, "(b t) h v -> b t h v", b=q_BTHK.shape[0])[..., :v_width]
