"""Tokens in, hidden vectors out; the head that turns them into logits is a call of its own.

    x = embed(tokens) (+ positions) -> stack -> norm -> hidden;   logits = head(hidden)

Splitting the head off lets an objective compute the loss in pieces, generation ask for the last
token's logits only, and further heads read the same hidden vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import State
from llmtrain.model.embedding import Embedding, TiedHead
from llmtrain.model.linear import Linear
from llmtrain.model.multi_token import MultiTokenModule
from llmtrain.model.stack import Stack
from llmtrain.model.width import Width


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """What a model remembers of its rows. Rows may have read different numbers of tokens.

    length_B: int64 [B], tokens read so far; layers: one State per application of a block.
    """

    length_B: Tensor
    layers: list[State]

    def select(self, index_B: Tensor) -> ModelState:
        """The rows of index_B (int64), in that order."""
        layers = [{name: x.index_select(0, index_B) for name, x in s.items()} for s in self.layers]
        return ModelState(length_B=self.length_B.index_select(0, index_B), layers=layers)

    @staticmethod
    def cat(states: Sequence[ModelState]) -> ModelState:
        """The rows of all states, one after another; all made with the same max_tokens."""
        layers = [
            {name: torch.cat([s[name] for s in layer]) for name in layer[0]}
            for layer in zip(*(state.layers for state in states), strict=True)
        ]
        return ModelState(length_B=torch.cat([s.length_B for s in states]), layers=layers)


class ModelOutput(NamedTuple):
    """A tuple, so that ZeRO-3's hooks find the tensors in it.

    hidden_BTD: after the final norm, in the compute dtype; state: None when none was given.
    """

    hidden_BTD: Tensor
    state: ModelState | None
    aux: Aux


class LanguageModel(nn.Module):
    """vocab_size: tokens that can be predicted; padded_vocab_size: rows of embedding and head.

    norm: the final norm; dropped when the stack's last block ends in a norm of its own.
    compute_dtype: of the activations, from the embedding's output on. mtp: modules of multi-token
    prediction, which only look_ahead runs. logit_scale: of what the head reads; width: how the
    parameters grow (model/width.py). Both are set by build_model.
    """

    logit_scale: float = 1.0
    width: Width | None = None

    def __init__(
        self,
        *,
        embedding: Embedding,
        position: nn.Module,
        stack: Stack,
        norm: nn.Module,
        vocab_size: int,
        padded_vocab_size: int,
        compute_dtype: torch.dtype = torch.float32,
        mtp: Sequence[MultiTokenModule] = (),
    ):
        super().__init__()
        rows, d_model = embedding.weight.shape
        if padded_vocab_size != rows or vocab_size > rows:
            raise ValueError(
                f"model: got vocab_size={vocab_size} and padded_vocab_size={padded_vocab_size}, "
                f"expected the embedding's {rows} rows and no more tokens than that; build the "
                "embedding with vocab_size=padded_vocab_size"
            )
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.compute_dtype = compute_dtype
        self.embedding = embedding
        self.position = position
        self.stack = stack
        self.norm = nn.Identity() if stack.normalises_output else norm
        self.head = (
            TiedHead(embedding)
            if embedding.tied
            else Linear(d_model, rows, init_std=embedding.init_std)
        )
        if not embedding.tied:
            self.head.scaled_init = embedding.scaled_init
        self.mtp = nn.ModuleList(mtp) if mtp else None

    def forward(
        self, tokens_BT: Tensor, ctx: SequenceContext, state: ModelState | None = None
    ) -> ModelOutput:
        """All tokens of the rows. With a state: continue it by T tokens; it must not be used again.

        Every row of the state must have read ctx.prefix_tokens tokens, and ctx must be dense.
        """
        if state is not None and not ctx.is_dense:
            raise ValueError(
                "model: got a state together with packed rows, expected rows of one document; "
                "make the context with SequenceContext.dense"
            )
        x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        x_BTD = self.position.add(x_BTD, ctx)
        ctx = ctx.with_rotary(self.position.rotary(ctx))
        x_BTD, layers, aux = self.stack(x_BTD, ctx, None if state is None else state.layers)
        new_state = None
        if state is not None:
            length_B = state.length_B + tokens_BT.shape[1]
            new_state = ModelState(length_B=length_B, layers=layers)
        return ModelOutput(self.norm(x_BTD), new_state, aux)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """logits_BTO in the compute dtype, O = vocab_size: padding rows never get probability.
        Soft-capped ones are float32 at least: tanh gives the largest ones nearly equal values."""
        logits_BTO = self.head(self.head_input(hidden_BTD))[..., : self.vocab_size]
        cap = self.embedding.logit_softcap
        if cap is None:
            return logits_BTO
        wide = torch.promote_types(logits_BTO.dtype, torch.float32)
        return cap * torch.tanh(logits_BTO.to(wide) / cap)

    def head_input(self, hidden_BTD: Tensor) -> Tensor:
        """What the head reads."""
        return hidden_BTD if self.logit_scale == 1 else hidden_BTD * self.logit_scale

    @property
    def head_weight(self) -> Tensor:
        """[padded_vocab_size, D]. Under ZeRO-3 the module that asks for it has it gathered."""
        return self.embedding.weight if self.embedding.tied else self.head.weight

    def look_ahead(
        self,
        module: MultiTokenModule,
        hidden_BTD: Tensor,
        tokens_BT: Tensor,
        ctx: SequenceContext,
        state: State | None = None,
        *,
        known_BT: Tensor | None = None,
    ) -> tuple[Tensor, State | None, Aux]:
        """One module of mtp: (hidden_BTD to be read by the head, state, aux).

        hidden_BTD: the model's, or those of the module before; ctx: of these positions. tokens_BT:
        as many places ahead as the module has before it, plus one. known_BT: False where that token
        is not to be seen. With a state: continue it, as in forward.
        """
        x_BTD = self.embedding(tokens_BT).to(self.compute_dtype)
        if known_BT is not None:
            x_BTD = torch.where(known_BT[..., None], x_BTD, 0)
        # what only the stack reads would make compiled blocks look different
        ctx = replace(ctx, repeats=None, noise_seeds_B=None)
        ctx = ctx.with_rotary(self.position.rotary(ctx))
        if self.stack.activation_checkpointing == "full" and torch.is_grad_enabled():
            return checkpoint(
                module,
                hidden_BTD,
                x_BTD,
                ctx,
                state,
                use_reentrant=False,
                preserve_rng_state=module.block.channel.stochastic,
            )
        return module(hidden_BTD, x_BTD, ctx, state)

    def step(self, tokens_B: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One more token a row; rows may have different lengths. Returns logits_BO."""
        positions_BT = state.length_B[:, None]
        ctx = SequenceContext(positions_BT=positions_BT, max_seqlen=1)
        x_BTD = self.embedding(tokens_B[:, None]).to(self.compute_dtype)
        x_BTD = self.position.add(x_BTD, ctx)
        ctx = ctx.with_rotary(self.position.rotary(ctx))
        x_BD, layers = self.stack.step(x_BTD[:, 0], ctx, state.layers)
        new_state = ModelState(length_B=state.length_B + 1, layers=layers)
        return self.logits(self.norm(x_BD)), new_state

    def init_state(self, batch: int, max_tokens: int) -> ModelState:
        """The state of rows that have read nothing and will read at most max_tokens."""
        device = self.embedding.weight.device
        return ModelState(
            length_B=torch.zeros(batch, dtype=torch.int64, device=device),
            layers=self.stack.init_state(
                batch, max_tokens=max_tokens, device=device, dtype=self.compute_dtype
            ),
        )

    def flops_per_token(self, tokens: int) -> float:
        """Forward FLOPs per token in a row of that many tokens, head included, mtp not."""
        return self.stack.flops_per_token(tokens) + self.head.flops_per_token()

    def mtp_flops_per_token(self, tokens: int) -> float:
        """What multi-token prediction adds to that in training, each module with a head."""
        head = self.head.flops_per_token()
        return sum(module.flops_per_token(tokens) + head for module in self.mtp or ())
