"""The scalar-decay recurrence in chunks: few large matrix products, memory linear in T.

Dao and Gu 2024, arXiv:2405.21060, section 6 (block decomposition of a semiseparable matrix). With
a_i the sum of a chunk's gates up to token i, its own included:

    1. within a chunk       o_i  = sum_{j <= i} exp(a_i - a_j) (q_i . k_j) v_j
    2. state of a chunk     S'_m = sum_j exp(a_C - a_j) k_j v_j^T
    3. passing states on    S_m  = exp(a_C) S_{m-1} + S'_m
    4. from state to output o_i += exp(a_i) q_i^T S_{m-1}

Step 3 is the recurrence again, over chunks instead of tokens; chunks are taken in blocks, blocks in
blocks of blocks, so that the number of operations grows with log T and sums of gates stay short.

Products run in the inputs' dtype and accumulate in float32; gates, their sums and the states that
are passed on are float32 (float64 for float64 inputs). Exponents are sums of gates, hence <= 0.

Documents: pairs of step 1 are of one document, a chunk's state counts the tokens of its last
token's document, and a state is handed on or read only within its document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# exp(GATE_FLOOR) is 2e-22: what a gate below it leaves of a state is lost in float64's rounding
# too. The floor keeps sums of gates finite, and small enough that float32 resolves their tails.
GATE_FLOOR = -50.0
BLOCK = 16  # at most so many chunks pass on their states by one matrix product


def run(
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
) -> tuple[Tensor, Tensor | None]:
    """(o_BTHV in float32 or float64, state_BHKV or None). Arguments as scalar_decay().

    In the shapes below r are the heads of a group; (g r) = h, (m c) = t.
    """
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    tokens, groups = v_BTHV.shape[1], k_BTGK.shape[2]
    scale = k_BTGK.shape[3] ** -0.5 if scale is None else scale
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    if padding:  # gates of 0 and keys of 0 change neither outputs nor the state
        q_BTGK, k_BTGK, v_BTHV = (
            F.pad(z, (0, 0, 0, 0, 0, padding)) for z in (q_BTGK, k_BTGK, v_BTHV)
        )
        g_BTH = F.pad(g_BTH, (0, 0, 0, padding))
        if doc_ids_BT is not None:
            last_BT = doc_ids_BT[:, -1:].expand(-1, padding)
            doc_ids_BT = torch.cat([doc_ids_BT, last_BT], dim=1)
    q_BMGCK = rearrange(q_BTGK, "b (m c) g k -> b m g c k", c=chunk)
    k_BMGCK = rearrange(k_BTGK, "b (m c) g k -> b m g c k", c=chunk)
    v_BMGrCV = rearrange(v_BTHV, "b (m c) (g r) v -> b m g r c v", c=chunk, g=groups)
    g_BMGrC = rearrange(g_BTH.to(dtype), "b (m c) (g r) -> b m g r c", c=chunk, g=groups)
    a_BMGrC = g_BMGrC.clamp(min=GATE_FLOOR).cumsum(dim=-1)
    ids_BMC = None
    if doc_ids_BT is not None:
        ids_BMC = rearrange(doc_ids_BT, "b (m c) -> b m c", c=chunk)

    inner_BMGrCV = within_chunks(q_BMGCK, k_BMGCK, v_BMGrCV, a_BMGrC, ids_BMC)
    states_BMGrKV = chunk_states(k_BMGCK, v_BMGrCV, a_BMGrC, ids_BMC)
    before_BMGrKV, last_BGrKV = pass_states(
        states_BMGrKV.to(dtype),
        a_BMGrC[..., -1],
        None if ids_BMC is None else ids_BMC[..., -1],
        None
        if initial_state_BHKV is None
        else rearrange(initial_state_BHKV.to(dtype), "b (g r) k v -> b g r k v", g=groups),
    )
    outer_BMGrCV = from_states(q_BMGCK, before_BMGrKV, a_BMGrC, ids_BMC)
    o_BMGrCV = scale * (inner_BMGrCV + outer_BMGrCV)
    o_BTHV = rearrange(o_BMGrCV, "b m g r c v -> b (m c) (g r) v")[:, :tokens]
    if not return_state:
        return o_BTHV, None
    return o_BTHV, rearrange(last_BGrKV, "b g r k v -> b (g r) k v")


def decay_matrix(a_xC: Tensor, ids_xC: Tensor | None) -> Tensor:
    """exp(a_i - a_j) [..., C, C] for j <= i of one document, else 0. ids: broadcastable to a."""
    steps = torch.arange(a_xC.shape[-1], device=a_xC.device)
    seen_CC = steps[:, None] >= steps
    if ids_xC is not None:
        seen_CC = seen_CC & (ids_xC[..., :, None] == ids_xC[..., None, :])
    # hidden before exp: above the diagonal the differences are positive
    return (a_xC[..., :, None] - a_xC[..., None, :]).masked_fill(~seen_CC, float("-inf")).exp()


def within_chunks(
    q_BMGCK: Tensor, k_BMGCK: Tensor, v_BMGrCV: Tensor, a_BMGrC: Tensor, ids_BMC: Tensor | None
) -> Tensor:
    """Step 1: o_BMGrCV in v's dtype. Scores are made once a group, weights once a head."""
    scores_BMGCC = q_BMGCK @ k_BMGCK.mT
    decay_BMGrCC = decay_matrix(a_BMGrC, None if ids_BMC is None else ids_BMC[:, :, None, None])
    weights_BMGrCC = (scores_BMGCC[:, :, :, None] * decay_BMGrCC).to(v_BMGrCV.dtype)
    return weights_BMGrCC @ v_BMGrCV


def chunk_states(
    k_BMGCK: Tensor, v_BMGrCV: Tensor, a_BMGrC: Tensor, ids_BMC: Tensor | None
) -> Tensor:
    """Step 2: S'_BMGrKV in v's dtype, of the tokens in the document of the chunk's last token."""
    heads = v_BMGrCV.shape[3]
    decay_BMGrC = (a_BMGrC[..., -1:] - a_BMGrC).exp()
    if ids_BMC is not None:
        counts_BMC = ids_BMC == ids_BMC[..., -1:]
        decay_BMGrC = torch.where(counts_BMC[:, :, None, None], decay_BMGrC, 0)
    faded_BMGrCV = (v_BMGrCV * decay_BMGrC[..., None]).to(v_BMGrCV.dtype)
    # the heads of a group share its keys: one product with their values side by side
    states = k_BMGCK.mT @ rearrange(faded_BMGrCV, "b m g r c v -> b m g c (r v)")
    return rearrange(states, "b m g k (r v) -> b m g r k v", r=heads)


def pass_states(
    states_BMGrKV: Tensor,
    decay_BMGr: Tensor,
    ids_BM: Tensor | None,
    initial_BGrKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step 3: (the state before every chunk [B, M, G, r, K, V], the one after the last).

    decay_BMGr: log decay over each chunk. ids_BM: document of each chunk's last token.
    """
    if initial_BGrKV is None:
        initial_BGrKV = torch.zeros_like(states_BMGrKV[:, 0])
    # the initial state is what a chunk before the first one left; no document has its number
    states_BMGrKV = torch.cat([initial_BGrKV[:, None], states_BMGrKV], dim=1)
    decay_BMGr = F.pad(decay_BMGr, (0, 0, 0, 0, 1, 0))
    ids_BM = None if ids_BM is None else F.pad(ids_BM, (1, 0), value=-1)
    after_BMGrKV = accumulate(states_BMGrKV, decay_BMGr, ids_BM)
    return after_BMGrKV[:, :-1], after_BMGrKV[:, -1]


def accumulate(states_BMGrKV: Tensor, decay_BMGr: Tensor, ids_BM: Tensor | None) -> Tensor:
    """S_m = exp(decay_m) S_{m-1} + states_m for all m, from S_{-1} = 0."""
    count, k_width = states_BMGrKV.shape[1], states_BMGrKV.shape[4]
    # as few blocks as BLOCK allows, equally long: 17 chunks are 2 x 9 and not 2 x 16
    block = -(-count // -(-count // BLOCK))
    padding = -count % block
    if padding:
        states_BMGrKV = F.pad(states_BMGrKV, (*(0, 0) * 4, 0, padding))
        decay_BMGr = F.pad(decay_BMGr, (0, 0, 0, 0, 0, padding))
        if ids_BM is not None:
            ids_BM = torch.cat([ids_BM, ids_BM[:, -1:].expand(-1, padding)], dim=1)
    # n blocks of c chunks each: the letters of tokens and chunks, one level up
    decay_BNGrC = rearrange(decay_BMGr, "b (n c) g r -> b n g r c", c=block)
    a_BNGrC = decay_BNGrC.clamp(min=GATE_FLOOR).cumsum(dim=-1)
    ids_BNC = None if ids_BM is None else rearrange(ids_BM, "b (n c) -> b n c", c=block)
    flat = rearrange(states_BMGrKV, "b (n c) g r k v -> b n g r c (k v)", c=block)
    own = decay_matrix(a_BNGrC, None if ids_BNC is None else ids_BNC[:, :, None, None]) @ flat
    if count > block:
        last_ids_BN = None if ids_BNC is None else ids_BNC[..., -1]
        totals = rearrange(own[..., -1, :], "b n g r (k v) -> b n g r k v", k=k_width)
        after = accumulate(totals, a_BNGrC[..., -1], last_ids_BN)
        before = rearrange(after, "b n g r k v -> b n g r 1 (k v)")[:, :-1]
        decay_BNGrC = a_BNGrC[:, 1:].exp()
        if ids_BNC is not None:
            reads_BNC = ids_BNC[:, 1:] == ids_BNC[:, :-1, -1:]
            decay_BNGrC = torch.where(reads_BNC[:, :, None, None], decay_BNGrC, 0)
        own = torch.cat([own[:, :1], own[:, 1:] + decay_BNGrC[..., None] * before], dim=1)
    after_BMGrKV = rearrange(own, "b n g r c (k v) -> b (n c) g r k v", k=k_width)
    return after_BMGrKV[:, :count]


def from_states(
    q_BMGCK: Tensor, before_BMGrKV: Tensor, a_BMGrC: Tensor, ids_BMC: Tensor | None
) -> Tensor:
    """Step 4: o_BMGrCV in float32, of what the chunks before left."""
    heads = before_BMGrKV.shape[3]
    before = rearrange(before_BMGrKV.to(q_BMGCK.dtype), "b m g r k v -> b m g k (r v)")
    read_BMGrCV = rearrange(q_BMGCK @ before, "b m g c (r v) -> b m g r c v", r=heads)
    decay_BMGrC = a_BMGrC.exp()
    if ids_BMC is not None:
        # before the first chunk there is zero or, without documents, the initial state
        before_ids_BM1 = F.pad(ids_BMC[:, :-1, -1:], (0, 0, 1, 0), value=-1)
        decay_BMGrC = torch.where((ids_BMC == before_ids_BM1)[:, :, None, None], decay_BMGrC, 0)
    return decay_BMGrC[..., None] * read_BMGrCV
