"""Learned token embedding, and the output head that shares its weight.

A tied head (Press and Wolf 2017, arXiv:1608.05859) reads logits_BTO = hidden_BTD W^T with the
embedding's own W [O, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.linear import cast_parameter


class Embedding(nn.Module):
    """tokens_BT -> x_BTD in the parameter's dtype (the model casts to its compute dtype).

    vocab_size: rows, padding included; tied: the output head uses this weight; scale: multiplies
    the looked-up rows, not the head (Gemma uses sqrt(D)); None is 1. logit_softcap: c, for logits
    c tanh(logits / c), which stay within (-c, c) (Gemma 2, arXiv:2408.00118; xLSTM-7B has 30); None
    is off.

    init_std: of the first values, also of an untied head's; None is 1 / sqrt(D). The head reads
    vectors of root mean square 1, so logits then start with a standard deviation of 1 at any width:
    near the uniform prediction, and already apart enough to learn from. The usual fixed 0.02 is
    that at D = 2500; at D = 128 and 384 a tied model is slower with it at first (after 100 to 120
    steps 0.1 to 0.6 nats).
    """

    def __init__(
        self,
        d_model: int,
        *,
        vocab_size: int,
        tied: bool = True,
        scale: float | None = None,
        init_std: float | None = None,
        logit_softcap: float | None = None,
    ):
        super().__init__()
        if logit_softcap is not None and logit_softcap <= 0:
            raise ValueError(
                f"embedding: got logit_softcap={logit_softcap}, expected a positive number or "
                "null; set embedding.logit_softcap"
            )
        self.tied, self.scale, self.logit_softcap = tied, scale, logit_softcap
        self.init_std = d_model**-0.5 if init_std is None else init_std
        self.scaled_init = ("weight",) if init_std is None else ()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.init_std, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = F.embedding(tokens_BT, self.weight)
        return x_BTD if self.scale is None else x_BTD * self.scale


class TiedHead(nn.Module):
    """hidden_BTD -> logits_BTO through the embedding's weight.

    The embedding is referred to from outside the module tree, so that its weight has one name, one
    owner and one entry in a state dict, and stays tied when the model moves to another device.
    """

    def __init__(self, embedding: Embedding):
        super().__init__()
        object.__setattr__(self, "embedding", embedding)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return F.linear(hidden_BTD, cast_parameter(self.embedding.weight, hidden_BTD))

    def flops_per_token(self) -> float:
        return 2.0 * self.embedding.weight.numel()
