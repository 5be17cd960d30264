"""One module of multi-token prediction: from what is known up to a token, one token further.

    h'_i = M [norm(h_i^(k-1)); norm(embed(t_(i+k)))]      k = 1 .. depth, h^0 the model's hidden
    h_i^k = norm(block(h'_i))                             logits of t_(i+k+1) = head(h_i^k)

DeepSeek-AI 2024 (arXiv:2412.19437), section 2.2, eq. 21 to 23. Embedding and head are the model's
own. The hidden vectors that go in and come out are those that a head reads, after a norm, so that
each module takes what the one before it gives.

Parameters: 2 D^2, three norms and a block. FLOPs a token: 4 D^2, those of the block and of a head.
State: the block's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import State
from llmtrain.model.block import Block
from llmtrain.model.linear import Linear


class MultiTokenModule(nn.Module):
    """norms: of the hidden vector, of the embedded token and of the output; the last is dropped
    when the block ends in a norm of its own. init_std: of the projection M from 2 D to D.

    ValueError for a mixer that sees later tokens, which are what is to be predicted.
    """

    def __init__(
        self,
        d_model: int,
        *,
        block: Block,
        norms: tuple[nn.Module, nn.Module, nn.Module],
        init_std: float = 0.02,
    ):
        super().__init__()
        if not block.mixer.causal:
            raise ValueError(
                f"multi_token: the last layer's mixer {type(block.mixer).__name__} sees later "
                "tokens, expected a causal one; choose another mixer or objective=causal"
            )
        self.norm_hidden, self.norm_embedding, norm = norms
        self.project = Linear(2 * d_model, d_model, init_std=init_std)
        self.block = block
        self.norm = nn.Identity() if block.normalises_output else norm

    def forward(
        self,
        hidden_BTD: Tensor,
        embedded_BTD: Tensor,
        ctx: SequenceContext,
        state: State | None = None,
    ) -> tuple[Tensor, State | None, Aux]:
        """(h^k, state, aux) of h^(k-1) and the embedded tokens k places ahead.

        Positions in ctx are those of the hidden vectors, and ctx holds the model's rotary angles.
        """
        both_BTE = [self.norm_hidden(hidden_BTD), self.norm_embedding(embedded_BTD)]
        x_BTD = self.project(torch.cat(both_BTE, dim=-1))
        x_BTD, state, aux = self.block(x_BTD, ctx, state)
        return self.norm(x_BTD), state, aux

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        return self.block.init_state(batch, max_tokens=max_tokens, device=device, dtype=dtype)

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens, without the head."""
        return self.project.flops_per_token() + self.block.flops_per_token(tokens)
