"""The contract of a channel mixer (the feed-forward part of a block).

tests/channels/test_contract.py checks each clause over every configs/channel/*.yaml.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.context import SequenceContext

# What a block hands up beside its output, by key:
#   loss/<name>    scalar, already weighted by its coefficient: added to the training loss
#   metric/<name>  scalar: logged, per layer; the mean over micro-batches and ranks
#   sum/<name>     any shape, float32 at least, detached: added over the micro-batches and ranks of
#                  an optimizer step, then handed to after_step of the channel that it came from
Aux = dict[str, Tensor]


class Channel(nn.Module):
    """Mixes the channels of each token: [B, T, D] -> [B, T, D].

    __init__(d_model, *, layer_idx, n_layers, <knobs>) only allocates; reset_parameters() fills the
    module's own direct parameters and buffers.
    """

    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    # What optimizer=muon takes for matrices, beside the weights of Linears: train/matrices.py
    matrices: ClassVar[tuple[str, ...]] = ()
    no_matrices: ClassVar[tuple[str, ...]] = ()
    adds_nothing: ClassVar[bool] = False  # a block then leaves it out, with its norms

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        raise NotImplementedError

    @property
    def stochastic(self) -> bool:
        """Whether forward draws random numbers in training, which recomputation must repeat."""
        return False

    @torch.no_grad()
    def after_step(self, sums: dict[str, Tensor]) -> Aux:
        """After an optimizer step, on every rank with the same values, before the next forward.

        sums: <name> -> "sum/<name>" over the whole step. After a skipped step all of them are
        zero, since the host does not know that it was skipped; zeros must change nothing.
        Returns scalars "metric/<name>" to log; they must not make the host wait for the device.
        """
        return {}

    def kernel_backend(self, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """Which kernel backend will run; None where there is no choice. ValueError when a backend
        was named that cannot run there."""
        return None

    def flops_per_token(self) -> float:
        """Forward FLOPs per token (multiply-add = 2)."""
        raise NotImplementedError

    def idle_parameters(self) -> int:
        """How many of its parameters have no part in the output of a given token."""
        return 0

    def kept_values(self) -> tuple[int, int]:
        """(values a token, parameters) of matrix products other than Linear's: inputs and outputs
        that the backward pass needs, for the estimate of memory."""
        return 0, 0
