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
    the looked-up rows, not the head (Gemma uses sqrt(D)); null is 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        vocab_size: int,
        tied: bool = True,
        scale: float | None = None,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.tied, self.scale, self.init_std = tied, scale, init_std
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

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
