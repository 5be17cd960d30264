"""The causal convolution by definition, one token after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, one token after the other."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    batch, tokens, width = x_BTD.shape
    window = weight_DW.shape[1]
    weight_WD = weight_DW.mT.to(dtype)
    if initial_state_BWD is None:
        initial_state_BWD = x_BTD.new_zeros(batch, window - 1, width)
    last_BWD = initial_state_BWD.to(x_BTD.dtype)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            same_B = doc_ids_BT[:, t] == doc_ids_BT[:, t - 1]
            last_BWD = torch.where(same_B[:, None, None], last_BWD, 0)
        seen_BWD = torch.cat([last_BWD, x_BTD[:, t : t + 1]], dim=1)
        y_BD = (seen_BWD.to(dtype) * weight_WD).sum(dim=1)
        if bias_D is not None:
            y_BD = y_BD + bias_D.to(dtype)
        outputs.append(F.silu(y_BD) if activation == "silu" else y_BD)
        last_BWD = seen_BWD[:, 1:]
    y_BTD = torch.stack(outputs, dim=1).to(x_BTD.dtype)
    return y_BTD, last_BWD if return_state else None
