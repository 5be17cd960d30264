"""Next-token prediction: weighted sums of the cross entropy, so that they add over ranks.

    loss_sum = sum_t w_t (ce_t + z_loss * lse_t^2) + weight_sum * (sum of the blocks' losses)
    ce_t = lse_t - logit_t[target_t],   lse_t = log sum exp logits_t

The trainer divides by the weights of the whole global batch. z_loss (Chowdhery et al. 2022,
arXiv:2204.02311, section 5, coefficient 1e-4) keeps logits from drifting.

Of the ways to a head's sums (backend), "logits" has them all in memory; the others
(llmtrain_kernels.linear_cross_entropy) have a chunk of them at a time, in the forward pass alone,
which also makes the gradients of the hidden vectors and of the head.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from llmtrain_kernels import triton_backend
from llmtrain_kernels.linear_cross_entropy import (
    BACKENDS,
    HeadLoss,
    linear_cross_entropy,
    select_backend,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.base import Aux
from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel

HEADS = ("auto", "logits", *BACKENDS)


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


class FusedLoss(nn.Module):
    """model, hidden_ND, targets_N, weights_N -> HeadLoss, without the model's logits.

    A module of its own, so that ZeRO-3 gathers the head's weight for it and lets go of it after.
    """

    def __init__(self, *, z_loss: float, chunk_tokens: int | None):
        super().__init__()
        self.z_loss, self.chunk_tokens = z_loss, chunk_tokens

    def forward(
        self,
        model: LanguageModel,
        hidden_ND: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        expected_gradient: float,
        backend: str,
    ) -> HeadLoss:
        return linear_cross_entropy(
            model.head_input(hidden_ND),
            model.head_weight,
            targets_N,
            weights_N,
            z_loss=self.z_loss,
            softcap=model.embedding.logit_softcap,
            vocab_size=model.vocab_size,
            chunk_rows=self.chunk_tokens,
            expected_gradient=expected_gradient,
            backend=backend,
        )


class Causal(nn.Module):
    """z_loss: coefficient, 0 is off. backend: auto | logits | triton | chunked | reference; auto is
    triton on CUDA where it can run, else logits.

    chunk_tokens: the head and the loss take that many tokens at a time. null: with logits all, else
    as many as fit 256 MiB or half the head's bytes. With logits a chunk is computed again in the
    backward pass, for one more head projection (2 D O FLOPs per token).
    """

    predicts_later_tokens: ClassVar[bool] = True  # so that no mixer may see them

    def __init__(
        self, *, z_loss: float = 0.0, chunk_tokens: int | None = None, backend: str = "auto"
    ):
        super().__init__()
        if backend not in HEADS:
            raise ValueError(
                f"backend: got {backend!r}, expected one of {', '.join(HEADS)}; "
                "set objective.backend"
            )
        if z_loss < 0:
            raise ValueError(f"z_loss: got {z_loss}, expected >= 0; set objective.z_loss")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(
                f"chunk_tokens: got {chunk_tokens}, expected >= 1 or null; "
                "set objective.chunk_tokens"
            )
        self.z_loss, self.chunk_tokens, self.backend = z_loss, chunk_tokens, backend
        self.token_loss = TokenLoss(z_loss=z_loss)
        self.fused_loss = FusedLoss(z_loss=z_loss, chunk_tokens=chunk_tokens)
        # What the gradient of loss_sum will be, as far as known. Another one is right too, and
        # costs the fused backends a pass over the gradient of the head.
        self.expected_gradient = 1.0

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

    def kernel_backend(self, *, device: torch.device, dtype: torch.dtype) -> str | None:
        """The fused backend that runs, None for logits. ValueError when the one named cannot."""
        backend = head_backend(self.backend, device.type, dtype)
        if backend == "logits":
            return None
        return select_backend(backend, device.type, dtype, torch.float32)

    def head_sums(
        self,
        model: LanguageModel,
        hidden_BTD: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        *,
        share: float = 1.0,
    ) -> HeadLoss:
        """Of one head; share: what its loss is multiplied by. The sums have a gradient only with
        logits, the loss always."""
        whole = hidden_BTD.flatten(0, 1), targets_BT.flatten(), weights_BT.flatten()
        backend = head_backend(self.backend, hidden_BTD.device.type, hidden_BTD.dtype)
        if backend != "logits":
            return self.fused_loss(model, *whole, self.expected_gradient * share, backend)
        ce_sum, lse_sum = self.sums_of_logits(model, *whole)
        loss = ce_sum + self.z_loss * lse_sum if self.z_loss > 0 else ce_sum
        return HeadLoss(loss, ce_sum, lse_sum)

    def sums_of_logits(
        self, model: LanguageModel, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sum of w ce, sum of w lse^2), in chunks when that is wanted."""
        whole = hidden_ND, targets_N, weights_N

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

    def total(self, sums: HeadLoss, weight_sum: Tensor, aux: Aux) -> LossOutput:
        """The loss of a head's sums and of the blocks."""
        loss_sum, ce_sum, lse_sum = sums
        if self.z_loss > 0:
            aux = {**aux, "metric/z_loss": (self.z_loss * lse_sum / weight_sum).detach()}
        for key, value in aux.items():
            if key.startswith("loss/"):
                loss_sum = loss_sum + weight_sum * value
        return LossOutput(loss_sum, ce_sum.detach(), weight_sum, aux)


@torch.compiler.assume_constant_result
def head_backend(requested: str, device: str, dtype: torch.dtype) -> str:
    """The way to a head's sums, of HEADS without auto. Plain values in and out: under torch.compile
    it runs while tracing."""
    if requested != "auto":
        return requested
    fused = device == "cuda" and triton_backend.unavailable(device, dtype) is None
    return "triton" if fused else "logits"
