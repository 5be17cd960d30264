"""The gated delta rule in chunks: the WY form, with memory linear in T.

Yang et al. 2024 (arXiv:2406.06484, section 3; with gates arXiv:2412.06464, section 3.3). Inside a
chunk, with a_i the sum of its gates up to token i, the rule unrolls to S_i = exp(a_i) S_0 +
sum_{j <= i} exp(a_i - a_j) k_j u_j^T, whose corrections u solve a triangular system:

    1. decays         D_ij = exp(a_i - a_j) for j <= i
    2. system         A_ij = beta_i D_ij k_i . k_j for j < i;   X = (I + A)^-1
    3. corrections    V' = X (beta v)    W = X (beta exp(a) k)    U = V' - W S_0
    4. passing on     S_C = exp(a_C) S_0 + sum_j D_Cj k_j u_j^T
    5. output         o_i = scale (exp(a_i) q_i^T S_0 + sum_{j <= i} D_ij (q_i . k_j) u_j)

The end of step 3 and step 4 are sequential over chunks (walk.py), everything else is one product
for all chunks. Products with the state, two of the three large ones, are in the inputs' dtype. The
system, its solution and the sums over corrections are in float32 whatever the inputs are (float64
stays): where keys are nearly equal, the corrections of a chunk are large and cancel in the sum, and
rounded to bfloat16 they would be all of the error.

Gates are summed in float64, which costs nothing at one number a head: a_i - a_j is then exact to
float32 after any decay before j. Exponents are <= 0, and masked before exp.

Documents: D is 0 between documents, and S_0 counts only for tokens of the document that the token
before the chunk belongs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.delta_rule.triangular import unit_lower_inverse
from llmtrain_kernels.delta_rule.walk import walk

# exp of it is 0 in float64 too; sums of gates stay finite, and exact to 1e-11.
GATE_FLOOR = -1000.0


def run(
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
) -> tuple[Tensor, Tensor | None]:
    """(o_BTHV in float32 or float64, state_BHKV or None). Arguments as gated_delta_rule().

    In the shapes below r are the heads of a group; (g r) = h, (m c) = t, N = B H.
    """
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    batch, tokens, heads, v_width = v_BTHV.shape
    groups, k_width = k_BTGK.shape[2:]
    scale = k_width**-0.5 if scale is None else scale
    while chunk // 2 >= tokens:
        chunk //= 2
    if g_BTH is None:
        g_BTH = torch.zeros_like(beta_BTH)
    padding = -tokens % chunk
    if padding:  # gates, betas and keys of 0 change neither outputs nor the state
        q_BTGK, k_BTGK, v_BTHV = (
            F.pad(z, (0, 0, 0, 0, 0, padding)) for z in (q_BTGK, k_BTGK, v_BTHV)
        )
        g_BTH, beta_BTH = (F.pad(z, (0, 0, 0, padding)) for z in (g_BTH, beta_BTH))
        if doc_ids_BT is not None:
            last_BT = doc_ids_BT[:, -1:].expand(-1, padding)
            doc_ids_BT = torch.cat([doc_ids_BT, last_BT], dim=1)
    q_MBG1CK = rearrange(q_BTGK, "b (m c) g k -> m b g 1 c k", c=chunk)
    k_MBG1CK = rearrange(k_BTGK.to(dtype), "b (m c) g k -> m b g 1 c k", c=chunk)
    v_MBGrCV = rearrange(v_BTHV.to(dtype), "b (m c) (g r) v -> m b g r c v", c=chunk, g=groups)
    g_MBGrC, beta_MBGrC = (
        rearrange(z, "b (m c) (g r) -> m b g r c", c=chunk, g=groups)
        for z in (g_BTH, beta_BTH.to(dtype))
    )

    begin_MBGrC, pair_MBGrCC = decays(g_MBGrC, doc_ids_BT, dtype)
    system_MBGrCC = beta_MBGrC[..., None] * pair_MBGrCC * (k_MBG1CK @ k_MBG1CK.mT)
    solved_MBGrCC = unit_lower_inverse(system_MBGrCC) * beta_MBGrC[..., None, :]
    v_new_MBGrCV = solved_MBGrCC @ v_MBGrCV
    w_MBGrCK = (solved_MBGrCC * begin_MBGrC[..., None, :]) @ k_MBG1CK
    k_end_MBGrCK = k_MBG1CK * pair_MBGrCC[..., -1, :, None]

    if initial_state_BHKV is None:
        state_NKV = begin_MBGrC.new_zeros(batch * heads, k_width, v_width)
    else:
        state_NKV = initial_state_BHKV.to(dtype).flatten(0, 1)
    u_MNCV, states_MNKV, last_NKV = walk(
        w_MBGrCK.to(q_BTGK.dtype).flatten(1, 3),
        v_new_MBGrCV.flatten(1, 3),
        k_end_MBGrCK.flatten(1, 3),
        begin_MBGrC[..., -1].flatten(1, 3),
        state_NKV,
    )

    split = {"b": batch, "g": groups}
    u_MBGrCV = rearrange(u_MNCV, "m (b g r) c v -> m b g r c v", **split)
    states_MBGrKV = rearrange(states_MNKV, "m (b g r) k v -> m b g r k v", **split)
    scores_MBGrCC = (q_MBG1CK.to(dtype) @ k_MBG1CK.mT) * pair_MBGrCC
    o_MBGrCV = begin_MBGrC[..., None] * (q_MBG1CK @ states_MBGrKV)
    o_MBGrCV = o_MBGrCV + scores_MBGrCC @ u_MBGrCV
    o_BTHV = scale * rearrange(o_MBGrCV, "m b g r c v -> b (m c) (g r) v")[:, :tokens]
    if not return_state:
        return o_BTHV, None
    return o_BTHV, rearrange(last_NKV, "(b h) k v -> b h k v", b=batch)


def decays(g_MBGrC: Tensor, doc_ids_BT: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Step 1: (exp(a_i) [..., C], what is left at i of what was there before the chunk;
    D_ij [..., C, C], what is left at i of what j wrote)."""
    chunk = g_MBGrC.shape[-1]
    a_MBGrC = g_MBGrC.double().clamp(min=GATE_FLOOR).cumsum(dim=-1)
    hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=g_MBGrC.device).triu(1)
    begin_MBGrC = a_MBGrC.to(dtype).exp()
    if doc_ids_BT is not None:
        ids_MBC = rearrange(doc_ids_BT, "b (m c) -> m b c", c=chunk)
        hidden = hidden | (ids_MBC[..., :, None] != ids_MBC[..., None, :])[:, :, None, None]
        # the first chunk's state is that of no document, and zero
        before_MB = torch.cat([ids_MBC[:1, :, 0], ids_MBC[:-1, :, -1]])
        goes_on_MBC = ids_MBC == before_MB[..., None]
        begin_MBGrC = begin_MBGrC * goes_on_MBC[:, :, None, None]
    exponents_MBGrCC = a_MBGrC[..., :, None] - a_MBGrC[..., None, :]
    pair_MBGrCC = exponents_MBGrCC.masked_fill(hidden, float("-inf")).to(dtype).exp()
    return begin_MBGrC, pair_MBGrCC
