"""A small model with the parameters that matter: tied table, matrices, norm, bias, odd sizes."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.data.batch import MicroBatch
from llmtrain.train.module import TrainModule
from llmtrain.train.optimizer import AdamW

VOCAB, WIDTH, TOKENS = 37, 13, 8
KNOBS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


class Layer(nn.Module):
    no_weight_decay: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Parameter(torch.ones(3, WIDTH))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD * self.gate.mean(0)
        return x_BTD + self.down(torch.tanh(self.up(self.norm(x_BTD))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.sometimes = nn.Parameter(torch.zeros(WIDTH))  # gets a gradient in some steps only
        self.use_sometimes = True

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        if self.use_sometimes:
            x_BTD = x_BTD + self.sometimes
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


class Loss(NamedTuple):
    loss_sum: Tensor
    ce_sum: Tensor
    weight_sum: Tensor
    aux: dict[str, Tensor]


class Objective(nn.Module):
    def forward(
        self,
        model: Model,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        ctx: SequenceContext,
    ) -> Loss:
        logits_BTO = model(tokens_BT)
        ce_BT = F.cross_entropy(logits_BTO.transpose(1, 2), targets_BT, reduction="none")
        ce_sum = (ce_BT * weights_BT).sum()
        return Loss(ce_sum, ce_sum.detach(), weights_BT.sum(), {"metric/max": logits_BTO.max()})


def build(seed: int = 0) -> tuple[TrainModule, AdamW]:
    torch.manual_seed(seed)
    token_bytes = torch.arange(VOCAB) % 5
    knobs = AdamW(**KNOBS, decay_embeddings=False)
    return TrainModule(Model(), Objective(), token_bytes), knobs


def global_batch(step: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, targets, weights of a step; some tokens of the last rows weigh nothing."""
    draw = torch.Generator().manual_seed(1000 + step)
    stream_BT = torch.randint(0, VOCAB, (rows, TOKENS + 1), generator=draw)
    weights_BT = torch.ones(rows, TOKENS)
    weights_BT[-1, 3:] = 0.0
    weights_BT[0, step % TOKENS] = 0.0
    return stream_BT[:, :-1], stream_BT[:, 1:], weights_BT


def micro_batches(
    step: int, *, rows: int, rank: int, size: int, micro_rows: int
) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    own = rows // size
    parts = [t[rank * own : (rank + 1) * own] for t in global_batch(step, rows)]
    return [
        MicroBatch(
            tokens_BT=tokens,
            targets_BT=targets,
            weights_BT=weights,
            ctx=SequenceContext.dense(len(tokens), TOKENS),
        )
        for tokens, targets, weights in zip(*(part.split(micro_rows) for part in parts))
    ]
