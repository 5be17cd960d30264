"""The contract of a channel mixer (the feed-forward part of a block)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from llmtrain.context import SequenceContext

# Scalars a block hands up beside its output. Keys "loss/<name>" are added to the training loss
# (already weighted by their coefficient); keys "metric/<name>" are only logged, per layer.
Aux = dict[str, Tensor]


class Channel(nn.Module):
    """Mixes the channels of each token: [B, T, D] -> [B, T, D].

    __init__(d_model, *, layer_idx, n_layers, <knobs>) only allocates; reset_parameters() fills the
    module's own direct parameters.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """Forward FLOPs per token (multiply-add = 2)."""
        raise NotImplementedError
