"""The causal convolution as torch operations on all tokens at once, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """All tokens at once: one product for each distance, on views of one padded copy of x.

    The products promote x to float32 without a copy of it, so that what the backward pass keeps of
    x stays in x's dtype.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    tokens, window = x_BTD.shape[1], weight_DW.shape[1]
    weight_DW = weight_DW.to(dtype)
    if initial_state_BWD is None:
        seen_BSD = F.pad(x_BTD, (0, 0, window - 1, 0))
    else:
        seen_BSD = torch.cat([initial_state_BWD.to(x_BTD.dtype), x_BTD], dim=1)
    y_BTD = x_BTD * weight_DW[:, -1]
    for distance in range(1, window):
        first = window - 1 - distance
        term_BTD = seen_BSD[:, first : first + tokens] * weight_DW[:, first]
        if doc_ids_BT is not None:
            before_BT = F.pad(doc_ids_BT, (distance, 0), value=-1)[:, :tokens]
            term_BTD = torch.where((before_BT == doc_ids_BT)[..., None], term_BTD, 0)
        y_BTD = y_BTD + term_BTD
    if bias_D is not None:
        y_BTD = y_BTD + bias_D.to(dtype)
    y_BTD = y_BTD.to(x_BTD.dtype) if activation is None else F.silu(y_BTD).to(x_BTD.dtype)
    if not return_state:
        return y_BTD, None
    state_BWD = seen_BSD[:, tokens:]
    if doc_ids_BT is not None:
        ids_BS = F.pad(doc_ids_BT, (window - 1, 0), value=-1)
        same_BW = ids_BS[:, tokens:] == doc_ids_BT[:, -1:]
        state_BWD = torch.where(same_BW[..., None], state_BWD, 0)
    return y_BTD, state_BWD
