"""The blocks of a model and the order in which they are applied.

    prelude blocks -> core blocks, `repeats` times -> coda blocks

A plain model is repeats = 1. A looped core (Dehghani et al. 2018, arXiv:1807.03819; Geiping et al.
2025, arXiv:2502.05171) shares its parameters between its applications; each application has a
state of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import State
from llmtrain.model.block import Block


class Stack(nn.Module):
    """x_BTD -> x_BTD through every application of a block.

    blocks: in order; the first `prelude` and the last `coda` are applied once, those between them
    `repeats` times. activation_checkpointing: "none", or "full" to keep only the inputs of blocks
    and recompute the rest in the backward pass; an attribute, since only training sets it.
    """

    def __init__(self, blocks: list[Block], *, prelude: int = 0, coda: int = 0, repeats: int = 1):
        super().__init__()
        core = len(blocks) - prelude - coda
        if min(prelude, coda) < 0 or repeats < 1:
            raise ValueError(
                f"stack: got prelude={prelude}, coda={coda}, repeats={repeats}, expected prelude "
                "and coda >= 0 and repeats >= 1; set stack.prelude, stack.coda, stack.repeats"
            )
        if repeats == 1 and (prelude or coda):
            raise ValueError(
                f"stack: got prelude={prelude} and coda={coda} with repeats=1, where they have no "
                "effect, expected both 0; set them to 0, or set stack.repeats"
            )
        if core < 1:
            raise ValueError(
                f"stack: prelude={prelude} and coda={coda} leave {core} of {len(blocks)} blocks to "
                "the repeated core, expected at least 1; lower them, or raise model.n_layers"
            )
        self.blocks = nn.ModuleList(blocks)
        self.activation_checkpointing = "none"
        first, last = prelude, prelude + core
        self.order = (
            *range(first),
            *[i for _ in range(repeats) for i in range(first, last)],
            *range(last, len(blocks)),
        )

    @property
    def applications(self) -> list[Block]:
        """The block of every application, in order; longer than `blocks` with a looped core."""
        return [self.blocks[i] for i in self.order]

    @property
    def normalises_output(self) -> bool:
        """True when the last block ends in a norm, so that the model needs no other."""
        return self.blocks[-1].norm_position == "post"

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, states: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None, Aux]:
        """states: one per application, or None. Aux: "loss/<name>" is summed over applications,
        "metric/<name>" becomes "metric/l<application>/<name>", and "sum/<name>" becomes
        "sum/l<application>/<name>", added over a block's applications under its first one's."""
        recompute = self.activation_checkpointing == "full" and torch.is_grad_enabled()
        new_states: list[State] = []
        merged: Aux = {}
        for i, block in enumerate(self.applications):
            state = None if states is None else states[i]
            if recompute:
                x_BTD, state, aux = checkpoint(
                    block,
                    x_BTD,
                    ctx,
                    state,
                    use_reentrant=False,
                    preserve_rng_state=block.channel.stochastic,
                )
            else:
                x_BTD, state, aux = block(x_BTD, ctx, state)
            new_states.append(state)
            for key, value in aux.items():
                kind, name = key.split("/", 1)
                if kind != "loss":
                    place = i if kind == "metric" else self.order.index(self.order[i])
                    key = f"{kind}/l{place:02d}/{name}"
                merged[key] = merged[key] + value if key in merged else value
        return x_BTD, None if states is None else new_states, merged

    def step(
        self, x_BD: Tensor, ctx: SequenceContext, states: list[State]
    ) -> tuple[Tensor, list[State]]:
        """One token a row; ctx.positions_BT is [B, 1]."""
        new_states = []
        for block, state in zip(self.applications, states, strict=True):
            x_BD, new_state = block.step(x_BD, ctx, state)
            new_states.append(new_state)
        return x_BD, new_states

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> list[State]:
        return [
            block.init_state(batch, max_tokens=max_tokens, device=device, dtype=dtype)
            for block in self.applications
        ]

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens, over all applications."""
        return sum(block.flops_per_token(tokens) for block in self.applications)

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one row's state after that many tokens, over all applications."""
        return sum(block.state_bytes(tokens, dtype) for block in self.applications)
