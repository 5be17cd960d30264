"""torch.nn.functional.scaled_dot_product_attention.

Dense rows take its causal kernels: flash on the CPU, cuDNN or flash on CUDA in half precision.
Documents, windows and caches become a boolean mask, and hidden pairs are computed too. For those
kernels keys and values of different widths are padded to one; the others take both.

cuDNN comes first for training on Hopper (and, not measured, Blackwell): on an H100, B4 T4096 H16
K128 bf16, it takes 0.60 ms forward and 2.15 ms with backward against flash's 1.01 and 3.58
(PyTorch 2.11, results/2026-11-23_attention_h100). It builds a plan for every new shape,
50 to 740 ms each (results/2026-11-23_dense_h100), so inference, whose lengths vary, stays with
flash.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from operator import index

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.mask import visible_BTS
from llmtrain_kernels.attention.widths import common_width, equal_widths

CUDNN_MAJORS = (9, 10)  # compute capabilities on which cuDNN comes before flash
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HALF = (torch.bfloat16, torch.float16)
FLASH_FIRST = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


def unsupported(case: Case) -> str | None:
    """SDPA runs all but capped scores, some of it slowly; select.py knows what."""
    return "has no softcap" if case.softcap else None


@torch.compiler.assume_constant_result
def prefers_cudnn() -> bool:
    """Whether the current CUDA device is one of CUDNN_MAJORS."""
    return torch.cuda.get_device_capability()[0] in CUDNN_MAJORS


def kernel_order(q: Tensor, masked: bool) -> AbstractContextManager:
    """The order in which SDPA tries its CUDA kernels; nothing to choose elsewhere."""
    if not q.is_cuda:
        return nullcontext()
    training = torch.is_grad_enabled() and q.requires_grad
    order = CUDNN_FIRST if training and not masked and prefers_cudnn() else FLASH_FIRST
    return sdpa_kernel(order, set_priority=True)


def pads(q_BTHK: Tensor, v_width: int, masked: bool) -> bool:
    """Whether widths differ where a flash kernel that knows one width could run."""
    flash = q_BTHK.is_cuda and q_BTHK.dtype in HALF and not masked
    k_width = index(q_BTHK.shape[3])
    return flash and k_width != v_width and common_width(k_width, v_width) <= 256


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
    tokens, heads, groups = q_BTHK.shape[1], index(q_BTHK.shape[2]), index(k_BSGK.shape[2])
    masked = doc_ids_BT is not None or window is not None or k_positions_BS is not None
    v_width = index(v_BSGV.shape[3])
    if pads(q_BTHK, v_width, masked):
        q_BTHK, k_BSGK, v_BSGV, scale = equal_widths(q_BTHK, k_BSGK, v_BSGV, scale)
    k_BGSK = rearrange(k_BSGK, "b s g k -> b g s k")
    v_BGSV = rearrange(v_BSGV, "b s g v -> b g s v")
    mask_B1TS = None
    if masked:
        mask_B1TS = visible_BTS(
            q_BTHK,
            k_BSGK,
            causal=causal,
            window=window,
            sinks=sinks,
            doc_ids_BT=doc_ids_BT,
            q_positions_BT=q_positions_BT,
            k_positions_BS=k_positions_BS,
        )[:, None]
        if tokens == 1:
            # The heads of a group see the same keys: as r queries they share one read of them.
            q_BGrK = rearrange(q_BTHK, "b 1 (g r) k -> b g r k", g=groups)
            with kernel_order(q_BTHK, masked=True):
                o_BGrV = F.scaled_dot_product_attention(
                    q_BGrK, k_BGSK, v_BGSV, attn_mask=mask_B1TS, scale=scale
                )
            return rearrange(o_BGrV, "b g r v -> b 1 (g r) v")
    # Only CUDA's flash and cuDNN kernels, and the CPU's, read a group for several heads.
    grouped = heads > groups
    if grouped and q_BTHK.is_cuda and (masked or q_BTHK.dtype not in HALF):
        k_BGSK = repeat(k_BGSK, "b g s k -> b (g r) s k", r=heads // groups)
        v_BGSV = repeat(v_BGSV, "b g s v -> b (g r) s v", r=heads // groups)
        grouped = False
    with kernel_order(q_BTHK, masked=masked):
        o_BHTV = F.scaled_dot_product_attention(
            rearrange(q_BTHK, "b t h k -> b h t k"),
            k_BGSK,
            v_BGSV,
            attn_mask=mask_B1TS,
            is_causal=causal and not masked,
            scale=scale,
            enable_gqa=grouped,
        )
    return rearrange(o_BHTV, "b h t v -> b t h v")[..., :v_width]
