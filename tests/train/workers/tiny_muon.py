"""The tiny model with what Muon adds: stacked experts, a packed projection, a router."""

from __future__ import annotations

from typing import ClassVar

import tiny
import torch
from torch import Tensor, nn

from llmtrain.train.module import TrainModule
from llmtrain.train.muon import Muon

KNOBS = {
    "lr": 2e-2,
    "adamw_lr": 1e-2,
    "lr_scaling": "match_rms_adamw",
    "momentum": 0.9,
    "nesterov": True,
    "ns_steps": 5,
    "ns_dtype": "auto",
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "decay_embeddings": False,
}
EXPERTS, HIDDEN = 3, 5


class Experts(nn.Module):
    matrices: ClassVar[tuple[str, ...]] = ("gate_up", "down")
    no_matrices: ClassVar[tuple[str, ...]] = ("router.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(tiny.WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, tiny.WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, tiny.WIDTH, HIDDEN) / 4)
        self.matrix_splits = {"gate_up": (HIDDEN, HIDDEN)}

    def forward(self, x_BTD: Tensor) -> Tensor:
        share_BTE = self.router(x_BTD).softmax(-1)
        gate, up = torch.einsum("btd,efd->btef", x_BTD, self.gate_up).chunk(2, dim=-1)
        y = torch.einsum("btef,edf->bted", torch.tanh(gate) * up, self.down)
        return x_BTD + (share_BTE[..., None] * y).sum(2)


def build(seed: int = 0, **changed: object) -> tuple[TrainModule, Muon]:
    module, _ = tiny.build(seed)
    module.model.layers.insert(1, Experts())
    return module, Muon(**{**KNOBS, **changed})
