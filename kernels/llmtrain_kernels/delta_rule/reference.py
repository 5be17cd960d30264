"""The gated delta rule by definition, token after token; the truth for every backend.

    u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)     what the state says wrongly about k_t
    S_t = exp(g_t) S_{t-1} + k_t u_t^T              S [K, V] of head h, in float32 (float64 stays)
    o_t = scale q_t^T S_t                           head h reads q and k of group h // (H / G)

Yang et al. 2024 (arXiv:2412.06464, eq. 10, transposed); g = 0 is arXiv:2406.06484, eq. 5. At a
document's first token S_{t-1} = 0. All three products are matrix products, so that counted FLOPs
are those of cost().
"""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor | None]:
    """(o_BTHV in float32 or float64, state_BHKV or None). Arguments as gated_delta_rule()."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    batch, tokens, heads, v_width = v_BTHV.shape
    groups, k_width = k_BTGK.shape[2:]
    scale = k_width**-0.5 if scale is None else scale
    q_BTHK = q_BTGK.to(dtype).repeat_interleave(heads // groups, dim=2)
    k_BTHK = k_BTGK.to(dtype).repeat_interleave(heads // groups, dim=2)
    v_BTHV, beta_BTH = v_BTHV.to(dtype), beta_BTH.to(dtype)
    decay_BTH = None if g_BTH is None else g_BTH.to(dtype).exp()
    if initial_state_BHKV is None:
        S_BHKV = v_BTHV.new_zeros(batch, heads, k_width, v_width)
    else:
        S_BHKV = initial_state_BHKV.to(dtype)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            same_B = doc_ids_BT[:, t] == doc_ids_BT[:, t - 1]
            S_BHKV = torch.where(same_B[:, None, None, None], S_BHKV, 0)
        if decay_BTH is not None:
            S_BHKV = decay_BTH[:, t, :, None, None] * S_BHKV
        known_BH1V = k_BTHK[:, t, :, None, :] @ S_BHKV
        u_BH1V = beta_BTH[:, t, :, None, None] * (v_BTHV[:, t, :, None, :] - known_BH1V)
        S_BHKV = S_BHKV + k_BTHK[:, t, :, :, None] @ u_BH1V
        o_BH1V = scale * q_BTHK[:, t, :, None, :] @ S_BHKV
        outputs.append(o_BH1V[:, :, 0])
    return torch.stack(outputs, dim=1), S_BHKV if return_state else None
