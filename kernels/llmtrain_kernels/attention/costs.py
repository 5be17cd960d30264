"""FLOPs and bytes of attention.

A (query, key) pair that the mask shows costs 2 K FLOPs for its score and 2 V for its share of the
output, per query head. Hidden pairs cost nothing: causal attention over T tokens has T (T + 1) / 2
pairs, a causal window of w tokens min(i + 1, w) for query i, and up to `sinks` more for the first
keys once they leave it, packed documents the sum over documents. The softmax itself (a few FLOPs a
pair) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmtrain_kernels.cost import Cost


def visible_pairs(
    tokens: int, *, causal: bool = True, window: int | None = None, sinks: int = 0
) -> int:
    """Number of (query, key) pairs that a sequence of that many tokens computes.

    window: a query sees keys less than `window` away, itself included. sinks: and the first so
    many keys (causal only).
    """
    reach = tokens if window is None else min(window, tokens)
    # keys at distance 0 .. reach-1 behind a query; the first queries have fewer
    behind = reach * tokens - reach * (reach - 1) // 2
    # query i >= window has left i - window + 1 keys behind, and sees min(sinks, that many) of them
    shown = min(sinks, tokens - reach)
    behind += shown * (tokens - reach) - shown * (shown - 1) // 2
    return behind if causal else 2 * behind - tokens


def cost(
    lengths: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    k_width: int,
    v_width: int,
    dtype: torch.dtype,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[Cost, Cost]:
    """(forward, backward) of sequences of these lengths: rows when dense, documents when packed.

    Backward: the gradients of scores, weights, queries, keys and values are four products of the
    size of the forward's two, hence twice its FLOPs; recomputing the scores is listed apart.
    """
    tokens = sum(lengths)
    pairs = sum(visible_pairs(n, causal=causal, window=window, sinks=sinks) for n in lengths)
    size = dtype.itemsize
    q_bytes = tokens * heads * k_width * size
    kv_bytes = tokens * kv_heads * (k_width + v_width) * size
    o_bytes = tokens * heads * v_width * size
    lse_bytes = tokens * heads * torch.float32.itemsize  # log of the softmax's denominator
    forward = Cost(
        flops=2.0 * heads * (k_width + v_width) * pairs,
        bytes_read=q_bytes + kv_bytes,
        bytes_written=o_bytes + lse_bytes,
        saved_bytes=q_bytes + kv_bytes + o_bytes + lse_bytes,
    )
    backward = Cost(
        flops=2 * forward.flops,
        recomputed_flops=2.0 * heads * k_width * pairs,
        bytes_read=q_bytes + kv_bytes + 2 * o_bytes + lse_bytes,  # o and its gradient
        bytes_written=q_bytes + kv_bytes,
    )
    return forward, backward
