"""A transformer block that several layers share, between layers of another mixer (Zamba).

    u = [x; e]                                       2 D wide; e is the stack's input
    y_i = W_i channel(norm2(attention(norm1(u))))    W_i [D, D], one for each application i
    x = x + mixer(norm(x + y_i))                     the layer after it; y_i goes no further

Glorioso et al. 2024 (arXiv:2405.16712), section 2 and figure 1: the cost of attention in memory of
parameters is paid once. Layers of other letters are ordinary blocks. FLOPs: every application's.
State: one of the shared block for each application.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from llmtrain.channels.base import Aux, Channel
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.model.block import Block
from llmtrain.model.linear import Linear
from llmtrain.model.stack import Stack, Walk


class SharedBlock(nn.Module):
    """u_BT(2D) -> y_BTD, without residual connections of its own; with no channel it ends at the
    mixer. norm1 is of width 2 D, as the mixer's input."""

    normalises_output = False

    def __init__(
        self, mixer: Mixer, channel: Channel, norm1: nn.Module, norm: Callable[[], nn.Module]
    ):
        super().__init__()
        self.norm1, self.mixer, self.channel = norm1, mixer, channel
        self.norm2 = None if channel.adds_nothing else norm()

    def forward(
        self, u_BTE: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None, Aux]:
        y_BTD, state = self.mixer(self.norm1(u_BTE), ctx, state)
        if self.norm2 is None:
            return y_BTD, state, {}
        y_BTD, aux = self.channel(self.norm2(y_BTD), ctx)
        return y_BTD, state, aux

    def step(self, u_BE: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        y_BD, state = self.mixer.step(self.norm1(u_BE), ctx, state)
        if self.norm2 is None:
            return y_BD, state
        y_B1D, _ = self.channel(self.norm2(y_BD)[:, None], ctx)
        return y_B1D[:, 0], state

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        return self.mixer.init_state(batch, max_tokens=max_tokens, device=device, dtype=dtype)

    def flops_per_token(self, tokens: int) -> float:
        return self.mixer.flops_per_token(tokens) + self.channel.flops_per_token()

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.mixer.state_bytes(tokens, dtype)


class SharedAttention(Stack):
    """layers: Blocks, and one SharedBlock before some of them; its links are W_i, in order.

    init_std: of the first weights of the links.
    """

    shares_a_branch = True

    def __init__(self, layers: list[Block | SharedBlock], *, d_model: int, init_std: float = 0.02):
        super().__init__(layers)
        shared = [isinstance(block, SharedBlock) for block in layers]
        if shared[-1] or any(a and b for a, b in pairwise(shared)):
            raise ValueError(
                "shared block: got no layer of another letter right after one of its applications, "
                "which is what reads its output, expected one; change stack.pattern"
            )
        self.links = nn.ModuleList(
            [Linear(d_model, d_model, init_std=init_std) for _ in range(sum(shared))]
        )

    @property
    def differentiated(self) -> list[nn.Module]:
        return [*self.applications, *self.links]

    def run(self, x: Tensor, ctx: SequenceContext, walk: Walk) -> Tensor:
        embedded, links, extra = x, iter(self.links), None
        for i in self.order:
            if isinstance(self.blocks[i], SharedBlock):
                extra = next(links)(walk(i, torch.cat([x, embedded], dim=-1), ctx))
            else:
                x, extra = walk(i, x, ctx, extra), None
        return x

    def flops_per_token(self, tokens: int) -> float:
        links = sum(link.flops_per_token() for link in self.links)
        return super().flops_per_token(tokens) + links
