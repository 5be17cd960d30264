"""No channel mixer: a block of a sequence mixer alone, x + mixer(norm(x)), as in Mamba-2.

Gu and Dao 2023 (arXiv:2312.00752), section 3.4: mixers that widen and gate by themselves do without
a feed-forward layer. The block also leaves out the norm that would stand before it. No parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.channels.base import Aux, Channel
from llmtrain.context import SequenceContext


class NoChannel(Channel):
    """Adds nothing to the residual stream."""

    adds_nothing = True

    def __init__(self, d_model: int, *, layer_idx: int, n_layers: int):
        super().__init__()

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        return torch.zeros_like(x_BTD), {}

    def flops_per_token(self) -> float:
        return 0.0
