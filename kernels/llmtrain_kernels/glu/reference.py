"""The definition of the gated linear units, and the plain torch formula beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activate(gate: Tensor, activation: str) -> Tensor:
    """act(gate) in gate's dtype."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def reference(gate_up_X2F: Tensor, *, activation: str = "silu") -> Tensor:
    """y_XF, in float32 at least and rounded once. Arguments as glu()."""
    wide = gate_up_X2F.to(torch.promote_types(gate_up_X2F.dtype, torch.float32))
    gate_XF, up_XF = wide.chunk(2, dim=-1)
    return (activate(gate_XF, activation) * up_XF).to(gate_up_X2F.dtype)


def formula(gate_up_X2F: Tensor, *, activation: str = "silu") -> Tensor:
    """The same in the dtype of the projection: the activation is rounded before the product."""
    gate_XF, up_XF = gate_up_X2F.chunk(2, dim=-1)
    return activate(gate_XF, activation) * up_XF
