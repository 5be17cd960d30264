"""gated_delta_rule(): the recurrence of DeltaNet and Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_heads, check_state
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.delta_rule import chunked, reference

BACKENDS = ("chunked", "reference")


def gated_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    *,
    scale: float | None = None,
    initial_state_BHKV: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(o_BTHV in v's dtype, state_BHKV in float32 (float64) or None).

        S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T     o_t = scale q_t^T S_t

    H is a multiple of G; head h reads q and k of group h // (H / G). q, k, v are of one dtype.
    Keys have norm at most 1 and beta lies in [0, 2], or the state may grow without bound.
    g_BTH: log decays <= 0, float32 (float64 with float64 inputs), any size; None for no decay.
    beta_BTH: float32 (float64). scale: 1 / sqrt(K) if None.
    initial_state_BHKV: S before the first token, zeros if None.
    doc_ids_BT: integers that never fall along a row; a new one starts from S = 0.
    chunk: tokens of a chunk, a power of two. backend: auto | chunked | reference; auto is chunked,
    and the reference for a single token, which is one turn of its loop.
    ValueError for shapes that do not fit, or an initial state together with documents.
    """
    check(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, initial_state_BHKV, doc_ids_BT, chunk, backend)
    if backend == "reference" or (backend == "auto" and v_BTHV.shape[1] == 1):
        o_BTHV, state_BHKV = reference.run(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            g_BTH,
            beta_BTH,
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
            beta_BTH,
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
    g_BTH: Tensor | None,
    beta_BTH: Tensor,
    initial_state_BHKV: Tensor | None,
    doc_ids_BT: Tensor | None,
    chunk: int,
    backend: str,
) -> None:
    """ValueError when the arguments of gated_delta_rule() do not fit together."""
    check_backend("gated_delta_rule", backend, BACKENDS)
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(
            f"gated_delta_rule: got chunk={chunk}, expected a power of two, because the system of "
            "a chunk is solved by halves; set chunk to 32, 64 or 128"
        )
    numbers = {"beta": beta_BTH} if g_BTH is None else {"beta": beta_BTH, "gates": g_BTH}
    check_heads("gated_delta_rule", q_BTGK, k_BTGK, v_BTHV, numbers)
    batch, _, heads, v_width = v_BTHV.shape
    expected = (batch, heads, k_BTGK.shape[3], v_width)
    check_state("gated_delta_rule", initial_state_BHKV, expected, doc_ids_BT)


def cost(
    tokens: int, *, heads: int, groups: int, k_width: int, v_width: int, dtype: torch.dtype
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T), of the recurrence itself.

    Forward: what the state says about k, the write k u^T and the read q^T S, 2 K V each a head.
    Backward: two products for each of them. What a chunked form computes besides is not counted.
    """
    size = dtype.itemsize
    qk_bytes = 2 * tokens * groups * k_width * size
    v_bytes = tokens * heads * v_width * size
    gate_bytes = 2 * tokens * heads * torch.promote_types(dtype, torch.float32).itemsize
    forward = Cost(
        flops=6.0 * tokens * heads * k_width * v_width,
        bytes_read=qk_bytes + v_bytes + gate_bytes,
        bytes_written=v_bytes,
        saved_bytes=qk_bytes + v_bytes + gate_bytes,
    )
    backward = Cost(
        flops=2 * forward.flops,
        bytes_read=qk_bytes + 2 * v_bytes + gate_bytes,  # v and the output's gradient
        bytes_written=qk_bytes + v_bytes + gate_bytes,
    )
    return forward, backward
