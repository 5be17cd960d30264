"""Normalisation of every head by itself, with statistics in at least float32.

    layernorm: y = (h - mean) / sqrt(var + eps) * w
    rmsnorm:   y = h / sqrt(mean(h^2) + eps) * w

The mean is over a head's width V, the gain w is one a channel of all heads. As the group
normalisation after a recurrence in RetNet (arXiv:2307.08621) and xLSTM (arXiv:2405.04517). With a
gate: y sigmoid(gate), in the same operation.
"""

from __future__ import annotations

import torch
from einops import rearrange
from llmtrain_kernels.norm import gated_layer_norm, gated_rms_norm, layer_norm, rms_norm
from torch import Tensor, nn

KINDS = ("layernorm", "rmsnorm")


class HeadNorm(nn.Module):
    """h_BTHV -> y_BTF of the same dtype, F = H V. kind: layernorm or rmsnorm."""

    def __init__(self, n_heads: int, head_width: int, *, kind: str, eps: float):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(
                f"head_norm: got {kind!r}, expected one of {', '.join(KINDS)}; set mixer.head_norm"
            )
        self.kind, self.eps, self.head_width = kind, eps, head_width
        self.weight = nn.Parameter(torch.empty(n_heads * head_width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, h_BTHV: Tensor, gate_BTF: Tensor | None = None) -> Tensor:
        """gate: before its sigmoid."""
        h_BTF = rearrange(h_BTHV, "... h v -> ... (h v)")
        options = {"eps": self.eps, "group_width": self.head_width}
        if gate_BTF is None:
            normalise = layer_norm if self.kind == "layernorm" else rms_norm
            return normalise(h_BTF, self.weight, **options)
        normalise = gated_layer_norm if self.kind == "layernorm" else gated_rms_norm
        options |= {"norm_before_gate": True, "activation": "sigmoid"}
        return normalise(h_BTF, gate_BTF, self.weight, **options)
