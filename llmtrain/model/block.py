"""One layer: a sequence mixer and a channel mixer, each with its norms, on the residual stream.

f stands for the mixer and then for the channel, n for norm1 and norm2, m for norm1_out, norm2_out:

    pre:       x = x + f(n(x))
    post:      x = n(x + f(x))          Vaswani et al. 2017 (arXiv:1706.03762), section 3.1
    peri:      x = x + m(f(n(x)))       Kim et al. 2025 (arXiv:2502.02732); Gemma 2 has it
    sandwich:  x = m(x + f(n(x)))       Geiping et al. 2025 (arXiv:2502.05171), section 3.2

After pre and peri the stack's output needs a last norm. ("Sandwich" is also said of peri; here it
is what the paper on recurrent depth means by it.) After post and sandwich the residual stream has
length sqrt(D) everywhere, so that a layer turns it little at first; with a tied head a plain stack
then says each token again, and stands still at the unigrams for hundreds of steps (docs/log.md).
With channel=none the second half is missing, its norms too, as in Mamba (arXiv:2312.00752).

The last addition of pre and peri can be left to the next block, whose first norm then makes it: a
stack hands (x, y) on, and the residual stream is x + y.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.channels.base import Aux, Channel
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.model.norm import add_and_norm

NORM_POSITIONS = ("pre", "post", "peri", "sandwich")


class Block(nn.Module):
    """x_BTD -> x_BTD. The state and the auxiliary scalars are those of its mixer and channel.

    norm: makes a norm over D; called once for each that norm_position has.
    """

    def __init__(
        self,
        mixer: Mixer,
        channel: Channel,
        norm: Callable[[], nn.Module],
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
        second, twice = not channel.adds_nothing, norm_position in ("peri", "sandwich")
        self.norm1, self.mixer = norm(), mixer
        self.norm1_out = norm() if twice else None
        self.norm2, self.channel = norm() if second else None, channel
        self.norm2_out = norm() if second and twice else None

    @property
    def normalises_output(self) -> bool:
        """True when the block ends in a norm, so that the model needs no other after it."""
        return self.norm_position in ("post", "sandwich")

    def forward(
        self,
        x_BTD: Tensor,
        ctx: SequenceContext,
        state: State | None = None,
        extra_BTD: Tensor | None = None,
    ) -> tuple[Tensor, State | None, Aux]:
        """extra_BTD: added to what the mixer reads, and not to the residual stream."""
        read_BTD = x_BTD if extra_BTD is None else x_BTD + extra_BTD
        x_BTD, y_BTD, *rest = self.inner(x_BTD, self.enter(read_BTD, self.norm1), ctx, state)
        return added(x_BTD, y_BTD), *rest

    def apart(
        self,
        x_BTD: Tensor,
        y_BTD: Tensor | None,
        ctx: SequenceContext,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor | None, State | None, Aux]:
        """forward() of x + y, or of x where y is None, with the result in two parts as well."""
        if y_BTD is None or self.norm_position == "post":
            x_BTD = added(x_BTD, y_BTD)
            read_BTD = self.enter(x_BTD, self.norm1)
        else:
            read_BTD, x_BTD = add_and_norm(self.norm1, y_BTD, x_BTD)
        return self.inner(x_BTD, read_BTD, ctx, state)

    def inner(
        self, x_BTD: Tensor, read_BTD: Tensor, ctx: SequenceContext, state: State | None
    ) -> tuple[Tensor, Tensor | None, State | None, Aux]:
        """The block after its first norm; read_BTD: what the mixer reads."""
        y_BTD, state = self.mixer(read_BTD, ctx, state)
        if self.norm2 is None:
            return *self.ending(x_BTD, y_BTD, self.norm1, self.norm1_out), state, {}
        x_BTD, read_BTD = self.between(x_BTD, y_BTD)
        y_BTD, aux = self.channel(read_BTD, ctx)
        return *self.ending(x_BTD, y_BTD, self.norm2, self.norm2_out), state, aux

    def compile(self, **options: object) -> None:
        """Let torch.compile take what follows the first norm: the same code with and without y."""
        self.inner = torch.compile(self.inner, **options)

    def step(
        self, x_BD: Tensor, ctx: SequenceContext, state: State, extra_BD: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One token a row; ctx.positions_BT is [B, 1]."""
        read_BD = x_BD if extra_BD is None else x_BD + extra_BD
        y_BD, state = self.mixer.step(self.enter(read_BD, self.norm1), ctx, state)
        if self.norm2 is None:
            return self.leave(x_BD, y_BD, self.norm1, self.norm1_out), state
        x_BD, read_BD = self.between(x_BD, y_BD)
        y_B1D, _ = self.channel(read_BD[:, None], ctx)
        return self.leave(x_BD, y_B1D[:, 0], self.norm2, self.norm2_out), state

    def enter(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a mixer or channel reads of the residual stream."""
        return x if self.norm_position == "post" else norm(x)

    def between(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(the residual stream with the mixer's output y added, what the channel reads of it)."""
        if self.norm_position in ("post", "sandwich"):
            x = self.leave(x, y, self.norm1, self.norm1_out)
            return x, self.enter(x, self.norm2)
        if self.norm_position == "peri":
            y = self.norm1_out(y)
        read, x = add_and_norm(self.norm2, y, x)
        return x, read

    def leave(self, x: Tensor, y: Tensor, norm: nn.Module, norm_out: nn.Module | None) -> Tensor:
        """The residual stream with an output y added."""
        return added(*self.ending(x, y, norm, norm_out))

    def ending(
        self, x: Tensor, y: Tensor, norm: nn.Module, norm_out: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream with an output y, in two parts to be added if that comes last."""
        if self.norm_position == "pre":
            return x, y
        if self.norm_position == "peri":
            return x, norm_out(y)
        return add_and_norm(norm if self.norm_position == "post" else norm_out, y, x)[0], None

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        return self.mixer.init_state(batch, max_tokens=max_tokens, device=device, dtype=dtype)

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens; norms are not counted."""
        return self.mixer.flops_per_token(tokens) + self.channel.flops_per_token()

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.mixer.state_bytes(tokens, dtype)


def added(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y
