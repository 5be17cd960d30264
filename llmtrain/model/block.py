"""One layer: a sequence mixer and a channel mixer, each with a norm, on the residual stream.

pre:  x = x + mixer(norm1(x));  x = x + channel(norm2(x))     (the stack's output needs a last norm)
post: x = norm1(x + mixer(x));  x = norm2(x + channel(x))     (Vaswani et al. 2017, section 3.1)

With channel=none the second half is missing, its norm too, as in Mamba (arXiv:2312.00752).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.channels.base import Aux, Channel
from llmtrain.channels.none import NoChannel
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State

NORM_POSITIONS = ("pre", "post")


class Block(nn.Module):
    """x_BTD -> x_BTD. The state and the auxiliary scalars are those of its mixer and channel."""

    def __init__(
        self,
        mixer: Mixer,
        channel: Channel,
        norm1: nn.Module,
        norm2: nn.Module,
        *,
        norm_position: str = "pre",
    ):
        super().__init__()
        if norm_position not in NORM_POSITIONS:
            raise ValueError(
                f"norm_position: got {norm_position!r}, expected one of "
                f"{', '.join(NORM_POSITIONS)}; set stack.norm_position"
            )
        self.norm_position = norm_position
        self.norm1, self.mixer = norm1, mixer
        self.channel = channel
        self.norm2 = None if isinstance(channel, NoChannel) else norm2

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None, Aux]:
        if self.norm_position == "pre":
            y_BTD, state = self.mixer(self.norm1(x_BTD), ctx, state)
            x_BTD = x_BTD + y_BTD
            if self.norm2 is None:
                return x_BTD, state, {}
            y_BTD, aux = self.channel(self.norm2(x_BTD), ctx)
            return x_BTD + y_BTD, state, aux
        y_BTD, state = self.mixer(x_BTD, ctx, state)
        x_BTD = self.norm1(x_BTD + y_BTD)
        if self.norm2 is None:
            return x_BTD, state, {}
        y_BTD, aux = self.channel(x_BTD, ctx)
        return self.norm2(x_BTD + y_BTD), state, aux

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        """One token a row; ctx.positions_BT is [B, 1]."""
        if self.norm_position == "pre":
            y_BD, state = self.mixer.step(self.norm1(x_BD), ctx, state)
            x_BD = x_BD + y_BD
            if self.norm2 is None:
                return x_BD, state
            return x_BD + self.token_channel(self.norm2(x_BD), ctx), state
        y_BD, state = self.mixer.step(x_BD, ctx, state)
        x_BD = self.norm1(x_BD + y_BD)
        if self.norm2 is None:
            return x_BD, state
        return self.norm2(x_BD + self.token_channel(x_BD, ctx)), state

    def token_channel(self, x_BD: Tensor, ctx: SequenceContext) -> Tensor:
        y_B1D, _ = self.channel(x_BD[:, None], ctx)
        return y_B1D[:, 0]

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        return self.mixer.init_state(batch, max_tokens=max_tokens, device=device, dtype=dtype)

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens; norms are not counted."""
        return self.mixer.flops_per_token(tokens) + self.channel.flops_per_token()

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.mixer.state_bytes(tokens, dtype)
