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
        visible = visible & (distance_BTS.abs() < window)
    if doc_ids_BT is not None:
        visible = visible & (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :])
    return visible.expand(-1, tokens, keys)
