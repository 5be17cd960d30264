"""Normalisation of every head by itself, with statistics in at least float32.

    layernorm: y = (h - mean) / sqrt(var + eps) * w
    rmsnorm:   y = h / sqrt(mean(h^2) + eps) * w

The mean is over a head's width V, the gain w is one a channel of all heads. As the group
normalisation after a recurrence in RetNet (arXiv:2307.08621) and xLSTM (arXiv:2405.04517).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llmtrain.model.linear import cast_parameter

KINDS = ("layernorm", "rmsnorm")


class HeadNorm(nn.Module):
    """h_BTHV -> y_BTF of the same dtype, F = H V. kind: layernorm or rmsnorm."""

    def __init__(self, n_heads: int, head_width: int, *, kind: str, eps: float):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(
                f"head_norm: got {kind!r}, expected one of {', '.join(KINDS)}; set mixer.head_norm"
            )
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(n_heads * head_width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, h_BTHV: Tensor) -> Tensor:
        # torch's fused operators compute in float32 inside when h is half precision
        normalise = F.layer_norm if self.kind == "layernorm" else F.rms_norm
        y_BTHV = normalise(h_BTHV, h_BTHV.shape[-1:], eps=self.eps)
        return rearrange(y_BTHV, "... h v -> ... (h v)") * cast_parameter(self.weight, h_BTHV)
