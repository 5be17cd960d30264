"""The layers of a model, one after another: x -> layer -> ... -> layer -> x.

A layer is an application of a block. Several layers may be applications of one block, which then
shares its parameters between them; each application has a state of its own. Stacks that join their
layers otherwise (model/recurrent_depth.py, model/shared_attention.py) override `run`.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import State
from llmtrain.model.block import Block, added


class Stack(nn.Module):
    """x_BTD -> x_BTD through every layer.

    layers: the block of each layer, the same object where layers share it. blocks: each block once.
    activation_checkpointing: "none", or "full" to keep only the inputs of blocks and recompute the
    rest in the backward pass; an attribute, since only training sets it.
    """

    # Shared blocks read [x; the stack's input], and their output is only read by the next layer.
    shares_a_branch: ClassVar[bool] = False

    def __init__(self, layers: list[Block]):
        super().__init__()
        blocks = list(dict.fromkeys(layers))
        self.blocks = nn.ModuleList(blocks)
        self.order = tuple(blocks.index(block) for block in layers)
        self.activation_checkpointing = "none"

    @property
    def layers(self) -> list[Block]:
        """The block of every layer."""
        return [self.blocks[i] for i in self.order]

    @property
    def applications(self) -> list[Block]:
        """The block of every application, in order: as many as there are states."""
        return self.layers

    @property
    def differentiated(self) -> list[nn.Module]:
        """The modules whose activations a training step keeps, once for each application."""
        return list(self.applications)

    @property
    def normalises_output(self) -> bool:
        """True when the last block ends in a norm, so that the model needs no other."""
        return self.layers[-1].normalises_output

    @property
    def draws_depth(self) -> bool:
        """True when the number of applications differs between micro-batches in training."""
        return False

    def drawn(
        self, ctx: SequenceContext, *, seed: int, step: int, first_row: int
    ) -> SequenceContext:
        """The context of a micro-batch in training, with what the stack draws at random for it.

        first_row: of the micro-batch, in the rows of all ranks in this step.
        """
        return ctx

    def set_depth(self, *, repeats: int | None = None, exit_threshold: float | None = None) -> Self:
        """Set the iterations at test time. ValueError for a stack that repeats nothing."""
        for name, value in (("repeats", repeats), ("exit_threshold", exit_threshold)):
            if value is not None:
                raise ValueError(
                    f"{name}: got {value}, but the layers of this model are applied once, expected "
                    f"null; set {name}=null, or take a model trained with stack=recurrent_depth"
                )
        return self

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, states: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None, Aux]:
        """states: one per application, or None.

        Aux: "loss/<name>" is summed over the applications that are differentiated; "metric/<name>"
        becomes "metric/l<i>/<name>", the mean over applications of blocks[i]; any other kind
        "<kind>/<name>" becomes "<kind>/l<i>/<name>", the sum over them.
        """
        walk = Walk(self, states)
        x_BTD = self.run(x_BTD, ctx, walk)
        return x_BTD, None if states is None else walk.states, walk.aux()

    def step(
        self, x_BD: Tensor, ctx: SequenceContext, states: list[State]
    ) -> tuple[Tensor, list[State]]:
        """One token a row; ctx.positions_BT is [B, 1]."""
        walk = Walk(self, states, step=True)
        return self.run(x_BD, ctx, walk), walk.states

    def run(self, x: Tensor, ctx: SequenceContext, walk: Walk) -> Tensor:
        """x_BTD, or x_BD in a step, through all layers; walk applies the blocks."""
        y = None
        for i in self.order:
            x, y = walk.apart(i, x, y, ctx)
        return added(x, y)

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

    def train_flops_per_token(self, tokens: int) -> float:
        """Forward and backward FLOPs per token; a backward pass is two forward passes."""
        return 3.0 * self.flops_per_token(tokens)

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one row's state after that many tokens, over all applications."""
        return sum(block.state_bytes(tokens, dtype) for block in self.applications)


class Walk:
    """One pass through a stack: applies its blocks, each with the state whose turn it is, and
    gathers the new states and what the blocks hand up."""

    def __init__(self, stack: Stack, given: list[State] | None, *, step: bool = False):
        self.blocks, self.given, self.step = stack.blocks, given, step
        self.recompute = stack.activation_checkpointing == "full"
        self.takes_losses = True  # what a stack does not differentiate sets it to False
        self.states: list[State] = []
        self.losses: Aux = {}
        self.sums: Aux = {}
        self.counts: dict[str, int] = {}

    def __call__(self, i: int, x: Tensor, ctx: SequenceContext, *extra: Tensor | None) -> Tensor:
        """blocks[i] applied to x; extra: further arguments of the block."""
        block, state = self.blocks[i], self.next_state()
        if self.step:
            x, state = block.step(x, ctx, state, *extra)
            self.states.append(state)
            return x
        if self.recompute and torch.is_grad_enabled():
            x, state, aux = checkpoint(
                block,
                x,
                ctx,
                state,
                *extra,
                use_reentrant=False,
                preserve_rng_state=block.channel.stochastic,
            )
        else:
            x, state, aux = block(x, ctx, state, *extra)
        self.gather(i, state, aux)
        return x

    def apart(
        self, i: int, x: Tensor, y: Tensor | None, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """blocks[i], a Block, applied to x + y, the result in two parts as well. One tensor in a
        step, and between blocks that are recomputed, of which that is what stays."""
        if self.step or (self.recompute and torch.is_grad_enabled()):
            return self(i, added(x, y), ctx), None
        x, y, state, aux = self.blocks[i].apart(x, y, ctx, self.next_state())
        self.gather(i, state, aux)
        return x, y

    def next_state(self) -> State | None:
        return None if self.given is None else self.given[len(self.states)]

    def gather(self, i: int, state: State | None, aux: Aux) -> None:
        """Keep what an application of blocks[i] handed up."""
        self.states.append(state)
        for key, value in aux.items():
            kind, name = key.split("/", 1)
            if kind == "loss":
                if self.takes_losses:
                    add(self.losses, key, value)
                continue
            place = f"{kind}/l{i:02d}/{name}"
            add(self.sums, place, value)
            self.counts[place] = self.counts.get(place, 0) + 1

    def aux(self) -> Aux:
        means = {
            key: value / self.counts[key] if key.startswith("metric/") else value
            for key, value in self.sums.items()
        }
        return self.losses | means


def add(sums: Aux, key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
