"""The contract of a sequence mixer: every file in this folder is one class that keeps it.

tests/mixers/test_contract.py checks each clause over every configs/mixer/*.yaml.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from llmtrain.context import SequenceContext

# Everything a layer remembers between calls. Every tensor has the batch as its first dimension, so
# that rows can be concatenated, selected and reordered without knowing the mixer.
State = dict[str, Tensor]


class Mixer(nn.Module):
    """Mixes information along the sequence: [B, T, D] -> [B, T, D].

    __init__(d_model, *, layer_idx, n_layers, <knobs>) only allocates (works on the meta device);
    reset_parameters() fills the module's own direct parameters, children fill theirs.
    """

    causal: ClassVar[bool] = True
    uses_positions: ClassVar[bool] = False  # reads ctx.rotary[self.rotary_width]
    rotary_width: int  # of the head part that positions may turn; set by those with uses_positions
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # names of parameters, relative to the mixer
    # What optimizer=muon takes for matrices, beside the weights of Linears: train/matrices.py
    matrices: ClassVar[tuple[str, ...]] = ()
    no_matrices: ClassVar[tuple[str, ...]] = ()
    # Parameters that reset_parameters draws with a factor 1 / sqrt(d_model): model/width.py
    scaled_init: tuple[str, ...] = ()

    @property
    def score_width(self) -> int | None:
        """Over how many channels the dot products of queries and keys go whose scale
        transfer_scores changes; None without any."""
        return None

    def transfer_scores(self, multiplier: float) -> None:
        """Scale scores for a score_width that is so many times that of the base (muP): 1 / width
        instead of 1 / sqrt(width), and equal to it at the base. A scale that was given is the
        base's."""
        raise NotImplementedError

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """All tokens of the rows. With a state: continue from it and return the new one; the given
        state must not be used again (its buffers may be reused). Without: the result's is None."""
        raise NotImplementedError

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """The state before the first token. max_tokens bounds what a cache must hold."""
        raise NotImplementedError

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        """One token a row; ctx.positions_BT is [B, 1] and may differ between rows."""
        raise NotImplementedError

    def cache_slots(self, state: State, positions_BT: Tensor) -> Tensor | None:
        """Where these tokens' entries lie in the second dimension of every tensor of the state, in
        the shape of positions_BT; None unless every token has an entry of its own there."""
        return None

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str | None:
        """Which kernel backend will train on rows of that many tokens, packed documents or not;
        None where there is no choice. ValueError when a backend was named that cannot run there."""
        return None

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens (multiply-add = 2)."""
        raise NotImplementedError

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one row's state after that many tokens."""
        raise NotImplementedError

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        """Bytes a token that the backward pass keeps beside inputs and outputs of Linears, for the
        estimate of memory: of the backend that trains, on rows of several chunks.

        compiled: operands of matrix products and of custom operators; torch.compile makes what lies
        between them again. Eager: also operands of everything elementwise.
        """
        return 0.0
