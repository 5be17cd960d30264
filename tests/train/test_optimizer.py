"""Which parameters decay, and what the optimizer is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrain.train.optimizer import AdamW

KNOBS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


class Part(nn.Module):
    no_weight_decay = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))
        self.linear = nn.Linear(3, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.position = nn.Embedding(6, 3)
        self.part = Part()
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)


def names(spec: AdamW, model: nn.Module) -> dict[str, set[str]]:
    return {group: set(members) for group, members in spec.groups(model).items()}


def test_groups():
    model = Model()
    groups = names(AdamW(**KNOBS, decay_embeddings=False), model)
    assert groups["decay"] == {"part.linear.weight", "head.weight"}
    expected = {"embedding.weight", "position.weight", "part.table", "part.linear.bias"}
    assert groups["no_decay"] == expected | {"norm.weight", "norm.bias"}
    decaying = names(AdamW(**KNOBS, decay_embeddings=True), model)["decay"]
    assert decaying == groups["decay"] | {"embedding.weight", "position.weight"}


def test_groups_inside_the_train_module():
    inner = Model()
    outer = nn.Module()
    outer.model = inner
    spec = AdamW(**KNOBS, decay_embeddings=False)
    prefixed = {g: {f"model.{n}" for n in members} for g, members in names(spec, inner).items()}
    assert names(spec, outer) == prefixed


def test_build_and_describe():
    model, spec = Model(), AdamW(**KNOBS, decay_embeddings=False)
    optimizer = spec.build(model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    decay, no_decay = spec.describe(model).splitlines()
    assert "weight decay 0.1" in decay
    assert "2 tensors" in decay
    assert decay.endswith("27 parameters")
    assert "6 tensors" in no_decay


def test_a_listed_parameter_must_exist():
    model = Model()
    model.part.no_weight_decay = ("A_log",)
    with pytest.raises(ValueError, match=r"part.A_log: listed in no_weight_decay, but the model"):
        AdamW(**KNOBS, decay_embeddings=False).groups(model)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("lr", -1.0, r"lr: got -1.0, expected at least 0; fix optimizer.lr"),
        ("beta2", 1.0, r"beta2: got 1.0, expected at least 0 and below 1; fix optimizer.beta2"),
        ("weight_decay", -0.1, r"weight_decay: got -0.1, expected at least 0"),
    ],
)
def test_errors(knob, value, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{**KNOBS, knob: value}, decay_embeddings=False)
