"""Which keys a query sees, as one boolean tensor: for backends that take a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_BTS(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    doc_ids_BT: Tensor | None,
    q_positions_BT: Tensor | None,
    k_positions_BS: Tensor | None,
) -> Tensor:
    """bool [B or 1, T, S], True where key s is visible to query t; arguments as attention().

    A few comparisons a pair, against 2 K products each for scores and values in the attention that
    follows, so layers do not share it; inside one compiled graph equal masks are computed once.
    """
    tokens, keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if k_positions_BS is None:
        q_positions_BT = torch.arange(tokens, device=q_BTHK.device)[None]
        k_positions_BS = q_positions_BT
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    visible = k_positions_BS[:, None, :] >= 0  # a negative position marks an empty cache slot
    if causal:
        visible = visible & (distance_BTS >= 0)
    if window is not None:
        near = distance_BTS.abs() < window
        if sinks:
            if doc_ids_BT is not None:
                k_positions_BS = document_positions(doc_ids_BT)
            near = near | (k_positions_BS[:, None, :] < sinks)
        visible = visible & near
    if doc_ids_BT is not None:
        visible = visible & (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :])
    return visible.expand(-1, tokens, keys)


def document_positions(doc_ids_BT: Tensor) -> Tensor:
    """int64 [B, T]: how many tokens of its document come before each token."""
    index_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    starts_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values
