"""attention(): softmax attention over rows, packed documents or a key/value cache."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.choice import DEFAULT, device_name, token_bounds, token_class
from llmtrain_kernels.attention.select import BACKENDS, announced


@torch.compiler.assume_constant_result
def choices(device: str, ordinal: int | None) -> tuple[str, tuple[int, ...]]:
    """(name of the device's table of choices, its bounds on tokens)."""
    name = device_name(ordinal) if device == "cuda" else DEFAULT
    return name, token_bounds(name)


@torch.compiler.assume_constant_result
def resolve(
    requested: str,
    device: str,
    ordinal: int | None,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    k_width: int,
    v_width: int,
    causal: bool,
    window: int | None,
    sinks: int,
    softcap: bool,
    documents: bool,
    boundaries: bool,
    cache: bool,
    training: bool,
    tokens: int | None,
) -> str:
    """Name of the backend. Plain values in and out: under torch.compile it runs while tracing."""
    capability = torch.cuda.get_device_capability(ordinal) if device == "cuda" else None
    case = Case(
        device=device,
        capability=capability,
        dtype=dtype,
        heads=heads,
        kv_heads=kv_heads,
        k_width=k_width,
        v_width=v_width,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
        documents=documents,
        boundaries=boundaries,
        cache=cache,
        training=training,
        table=choices(device, ordinal)[0],
        tokens=tokens,
    )
    return announced(case, requested)


def attention(
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
    backend: str = "auto",
) -> Tensor:
    """o_BTHV = softmax(scale q k^T) v over the visible keys, in q's dtype.

    H is a multiple of G; query head h reads group h // (H / G). Without positions S = T, and key j
    is visible to query i of the same row when j <= i (if causal), |i - j| < window (if given) and
    doc_ids_BT[b, i] == doc_ids_BT[b, j] (if given). With positions, the same holds for them in
    place of i and j, and a key position of -1 hides the key: an empty slot of a cache. Every query
    must see at least one key.

    sinks: with a window, the first so many tokens of a document (positions below it) stay visible
    to all after them (Xiao et al. 2023, arXiv:2309.17453). softcap: scores become
    softcap tanh(score / softcap) before the mask (Gemma 2, arXiv:2408.00118, section 2).
    scale: 1 / sqrt(K) if None.
    doc_ids_BT: integers. cu_seqlens (int32 [N+1], over the flattened rows) and max_seqlen (host
    int) say the same to kernels that take boundaries; give all three, as SequenceContext has them.
    backend: auto, or a name of BACKENDS; a named one that cannot run the call raises ValueError.
    """
    documents, cache = doc_ids_BT is not None, k_positions_BS is not None
    check(q_BTHK, k_BSGK, v_BSGV, window, sinks, softcap, causal)
    check_keys(q_BTHK, k_BSGK, documents, q_positions_BT is not None, cache)
    if window is not None and not cache and window >= q_BTHK.shape[1]:
        window, sinks = None, 0  # it hides nothing
    boundaries = cu_seqlens is not None and max_seqlen is not None
    if boundaries and not documents:
        raise ValueError(
            "attention: got cu_seqlens without doc_ids_BT, expected both; backends that take a "
            "mask need the ids"
        )
    _, bounds = choices(q_BTHK.device.type, q_BTHK.device.index)
    name = resolve(
        backend,
        q_BTHK.device.type,
        q_BTHK.device.index,
        q_BTHK.dtype,
        # index() fixes a size that torch.compile would leave open
        index(q_BTHK.shape[2]),
        index(k_BSGK.shape[2]),
        index(q_BTHK.shape[3]),
        index(v_BSGV.shape[3]),
        causal,
        window,
        sinks,
        softcap is not None,
        documents,
        boundaries,
        cache,
        torch.is_grad_enabled() and q_BTHK.requires_grad,
        token_class(q_BTHK.shape[1], bounds),
    )
    return BACKENDS[name].run(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        doc_ids_BT=doc_ids_BT,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        q_positions_BT=q_positions_BT,
        k_positions_BS=k_positions_BS,
    )


def check(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    window: int | None,
    sinks: int,
    softcap: float | None,
    causal: bool,
) -> None:
    """ValueError when heads or options of attention() do not fit together."""
    if k_BSGK.shape[2] != v_BSGV.shape[2] or q_BTHK.shape[2] % k_BSGK.shape[2]:
        raise ValueError(
            f"attention: got {q_BTHK.shape[2]} query heads, {k_BSGK.shape[2]} key and "
            f"{v_BSGV.shape[2]} value groups, expected as many groups of both, dividing the heads; "
            "set n_kv_heads to a divisor of n_heads"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"attention: got window={window}, expected at least 1 (a token sees itself); "
            "set window to null for no window"
        )
    if sinks < 0 or (sinks and (window is None or not causal)):
        raise ValueError(
            f"attention: got sinks={sinks} with window={window} and causal={causal}, expected 0, "
            "or a positive number with a window and causal; set sinks or window"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(
            f"attention: got softcap={softcap}, expected a positive number; set softcap to null "
            "for no cap"
        )


def check_keys(
    q_BTHK: Tensor, k_BSGK: Tensor, documents: bool, q_positions: bool, cache: bool
) -> None:
    """ValueError when attention() is not told which keys its queries see."""
    if q_positions != cache:
        raise ValueError(
            "attention: got positions for only one of queries and keys, expected both or none; "
            "give q_positions_BT and k_positions_BS together"
        )
    if cache and documents:
        raise ValueError(
            "attention: got positions and documents, expected one of them; a cache holds one "
            "document a row"
        )
    if not cache and q_BTHK.shape[1] != k_BSGK.shape[1]:
        raise ValueError(
            f"attention: got {q_BTHK.shape[1]} queries and {k_BSGK.shape[1]} keys a row, expected "
            "equal numbers; give q_positions_BT and k_positions_BS to read a cache"
        )
