"""scalar_decay(): the recurrence of Mamba-2, RetNet, mLSTM and others with one decay a head."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_heads, check_state
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.scalar_decay import chunked, reference

BACKENDS = ("chunked", "reference")


def scalar_decay(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(o_BTHV in v's dtype, state_BHKV in float32 (float64) or None).

        S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale q_t^T S_t

    H is a multiple of G; head h reads q and k of group h // (H / G). q, k, v are of one dtype.
    g_BTH: log decays <= 0, float32 (float64 with float64 inputs); any finite size, and -inf.
    scale: 1 / sqrt(K) if None. initial_state_BHKV: S before the first token, zeros if None.
    doc_ids_BT: integers >= 0 that never fall along a row; a new one starts from S = 0.
    chunk: tokens of a chunk, best a multiple of 16. backend: auto | chunked | reference.
    ValueError for shapes that do not fit, or an initial state together with documents.
    """
    check(q_BTGK, k_BTGK, v_BTHV, g_BTH, initial_state_BHKV, doc_ids_BT, chunk, backend)
    if backend == "reference":
        o_BTHV, state_BHKV = reference.run(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            g_BTH,
            scale=scale,
            initial_state_BHKV=initial_state_BHKV,
            doc_ids_BT=doc_ids_BT,
            return_state=return_state,
        )
    else:
        o_BTHV, state_BHKV = chunked.run(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            g_BTH,
            scale=scale,
            initial_state_BHKV=initial_state_BHKV,
            doc_ids_BT=doc_ids_BT,
            return_state=return_state,
            chunk=chunk,
        )
    return o_BTHV.to(v_BTHV.dtype), state_BHKV


def check(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    doc_ids_BT: Tensor | None,
    chunk: int,
    backend: str,
) -> None:
    """ValueError when the arguments of scalar_decay() do not fit together."""
    check_backend("scalar_decay", backend, BACKENDS)
    if chunk < 1:
        raise ValueError(f"scalar_decay: got chunk={chunk}, expected at least 1; set chunk")
    check_heads("scalar_decay", q_BTGK, k_BTGK, v_BTHV, {"gates": g_BTH})
    batch, _, heads, v_width = v_BTHV.shape
    expected = (batch, heads, k_BTGK.shape[3], v_width)
    check_state("scalar_decay", initial_state_BHKV, expected, doc_ids_BT)


def cost(
    tokens: int, *, heads: int, groups: int, k_width: int, v_width: int, dtype: torch.dtype
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T), of the recurrence itself.

    Forward: the write k v^T and the read q^T S, 2 K V each a head. Backward: a product for each of
    the gradients of q, k, v and S. What a chunked form computes besides is not counted.
    """
    size = dtype.itemsize
    qk_bytes = 2 * tokens * groups * k_width * size
    v_bytes = tokens * heads * v_width * size
    g_bytes = tokens * heads * torch.promote_types(dtype, torch.float32).itemsize
    forward = Cost(
        flops=4.0 * tokens * heads * k_width * v_width,
        bytes_read=qk_bytes + v_bytes + g_bytes,
        bytes_written=v_bytes,
        saved_bytes=qk_bytes + v_bytes + g_bytes,
    )
    backward = Cost(
        flops=2 * forward.flops,
        bytes_read=qk_bytes + 2 * v_bytes + g_bytes,  # v and the output's gradient
        bytes_written=qk_bytes + v_bytes + g_bytes,
    )
    return forward, backward
