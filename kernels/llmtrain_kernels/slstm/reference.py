"""The sLSTM recurrence, one token after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_FORGET_MAX = 1e30  # sums of log gates stay finite for any pre-activation
State = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    *,
    forget_gate: str = "sigmoid",
    initial_state: State | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The definition, one token after the other. Arguments as slstm()."""
    dtype = torch.promote_types(x_BTHX.dtype, torch.float32)
    batch, tokens, heads, _ = x_BTHX.shape
    r_HVX = r_HVX.to(dtype)
    if initial_state is None:
        state = tuple(r_HVX.new_zeros(batch, heads, r_HVX.shape[1]) for _ in range(4))
    else:
        state = tuple(z.to(dtype) for z in initial_state)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            same_B = doc_ids_BT[:, t] == doc_ids_BT[:, t - 1]
            state = tuple(torch.where(same_B[:, None, None], z, 0) for z in state)
        h, c, n, m = state
        gates_BHX = x_BTHX[:, t].to(dtype) + (h[:, :, None] @ r_HVX)[:, :, 0]
        z, i, f, o = gates_BHX.chunk(4, dim=-1)
        log_f = F.logsigmoid(f) if forget_gate == "sigmoid" else f.clamp(max=LOG_FORGET_MAX)
        carried = torch.where(n == 0, float("-inf"), log_f + m)
        m = torch.maximum(carried, i)
        write, keep = (i - m).exp(), (carried - m).exp()
        c, n = keep * c + write * z.tanh(), keep * n + write
        h = o.sigmoid() * (c / n)
        state = (h, c, n, m)
        outputs.append(h)
    h_BTHV = torch.stack(outputs, dim=1).to(x_BTHX.dtype)
    return h_BTHV, state if return_state else None
