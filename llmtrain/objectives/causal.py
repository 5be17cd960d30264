"""Next-token prediction: weighted sums of the cross entropy, so that they add over ranks.

    loss_sum = sum_t w_t (ce_t + z_loss * lse_t^2) + weight_sum * (sum of the blocks' losses)
    ce_t = lse_t - logit_t[target_t],   lse_t = log sum exp logits_t

The trainer divides by the weights of the whole global batch. z_loss (Chowdhery et al. 2022,
arXiv:2204.02311, section 5, coefficient 1e-4) keeps logits from drifting.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel


class LossOutput(NamedTuple):
    """A tuple, so that ZeRO-3's hooks find the tensors in it. All sums are float32 at least.

    loss_sum: what to differentiate, divided by the global weight sum; ce_sum: nats over the
    weighted tokens; weight_sum: their number; aux: the model's, plus metric/z_loss when it is on.
    """

    loss_sum: Tensor
    ce_sum: Tensor
    weight_sum: Tensor
    aux: Aux


class TokenLoss(nn.Module):
    """logits_NO, targets_N, weights_N -> (sum of w ce, sum of w lse^2; 0 without z_loss).

    A module of its own, to be compiled where the model is not: then float32 logits never exist in
    memory. Eager, [N, O] stands there in float32 two to three times: see Causal's chunk_tokens.
    """

    def __init__(self, *, z_loss: float):
        super().__init__()
        self.z_loss = z_loss

    def forward(
        self, logits_NO: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        # float32 at least: a bfloat16 logit of 20 has an error of 0.06
        logits_NO = logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32))
        ce_N = F.cross_entropy(logits_NO, targets_N, reduction="none")
        ce_sum = (weights_N * ce_N).sum()
        if self.z_loss == 0:
            return ce_sum, torch.zeros_like(ce_sum)
        return ce_sum, (weights_N * logits_NO.logsumexp(dim=-1).square()).sum()


class Causal(nn.Module):
    """z_loss: coefficient, 0 is off. chunk_tokens: null, or compute the head and the loss that many
    tokens at a time and again in the backward pass; memory for [chunk_tokens, O] instead of
    [B*T, O] logits, for one more head projection (2 D O FLOPs per token)."""

    predicts_later_tokens: ClassVar[bool] = True  # so that no mixer may see them

    def __init__(self, *, z_loss: float = 0.0, chunk_tokens: int | None = None):
        super().__init__()
        if z_loss < 0:
            raise ValueError(f"z_loss: got {z_loss}, expected >= 0; set objective.z_loss")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(
                f"chunk_tokens: got {chunk_tokens}, expected >= 1 or null; "
                "set objective.chunk_tokens"
            )
        self.z_loss, self.chunk_tokens = z_loss, chunk_tokens
        self.token_loss = TokenLoss(z_loss=z_loss)

    def forward(
        self,
        model: LanguageModel,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        ctx: SequenceContext,
    ) -> LossOutput:
        hidden_BTD, _, aux = model(tokens_BT, ctx)
        sums = self.head_sums(model, hidden_BTD, targets_BT, weights_BT)
        return self.total(sums, weights_BT.sum(), aux)

    def head_sums(
        self, model: LanguageModel, hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum of w ce, sum of w lse^2) of one head, in chunks when that is wanted."""
        whole = hidden_BTD.flatten(0, 1), targets_BT.flatten(), weights_BT.flatten()

        def head_loss(hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> tuple:
            return self.token_loss(model.logits(hidden_ND), targets_N, weights_N)

        if self.chunk_tokens is None or not torch.is_grad_enabled():
            return head_loss(*whole)
        sums = [
            checkpoint(head_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(*(part.split(self.chunk_tokens) for part in whole))
        ]
        ce_sum, lse_sum = (torch.stack(parts).sum() for parts in zip(*sums))
        return ce_sum, lse_sum

    def total(self, sums: tuple[Tensor, Tensor], weight_sum: Tensor, aux: Aux) -> LossOutput:
        """The loss of a head's sums and of the blocks."""
        ce_sum, lse_sum = sums
        loss_sum = ce_sum
        if self.z_loss > 0:
            loss_sum = loss_sum + self.z_loss * lse_sum
            aux = {**aux, "metric/z_loss": (self.z_loss * lse_sum / weight_sum).detach()}
        for key, value in aux.items():
            if key.startswith("loss/"):
                loss_sum = loss_sum + weight_sum * value
        return LossOutput(loss_sum, ce_sum.detach(), weight_sum, aux)
