"""The optimizer check: right optimizers pass, wrong ones are named, whatever the dtype and lr."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmtrain.distributed import World
from llmtrain.train.muon import Muon
from llmtrain.train.optimizer import AdamW
from llmtrain.train.partitions import Replicated
from llmtrain.train.reference import Step
from llmtrain.train.truth import OptimizerCheck, WrongUpdate, within

ALONE = World(rank=0, size=1, local_rank=0)
CPU = torch.device("cpu")
ADAMW = AdamW(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay_embeddings=False)
SHARED = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "decay_embeddings": False}
MUON = Muon(
    lr=1e-2,
    adamw_lr=2e-2,
    lr_scaling="match_rms_adamw",
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    ns_dtype="fp32",
    **SHARED,
)
BF16 = Muon(**{**vars(MUON), "ns_dtype": "bf16"})
ORIGINAL = Muon(**{**vars(MUON), "lr_scaling": "original", "nesterov": False})
SPECS = {"adamw": ADAMW, "muon": MUON, "bf16": BF16, "original": ORIGINAL}
STEP = {"ratio": 0.5, "factor": 0.25}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 200)
        self.down = nn.Linear(200, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)


def gradients(module: nn.Module, step: int) -> None:
    """Few directions in matrices, as in a training: bfloat16's iteration is inexact then."""
    draw = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        grad = torch.randn(parameter.shape, generator=draw)
        if grad.ndim == 2:
            scale = torch.arange(1.0, grad.shape[1] + 1) ** -1.5
            grad = (grad * scale) @ torch.randn(grad.shape[1], grad.shape[1], generator=draw)
        parameter.grad = grad


Wrong = Callable[[torch.optim.Optimizer, dict[Tensor, Tensor]], None]


def first_step(spec: AdamW | Muon, wrong: Wrong | None = None, *, when: str = "after") -> None:
    """Some steps, then one that is checked; wrong: done to the optimizer before or after it, with
    the weights as they were before."""
    torch.manual_seed(0)
    module = Model()
    check = OptimizerCheck(spec, module, elements=400_000, world=ALONE, device=CPU)
    optimizer = spec.build(module)
    parts = Replicated(module, optimizer, 0, 1)
    for step in range(3):
        gradients(module, step)
        optimizer.step()
    gradients(module, 3)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * STEP["ratio"]
    optimizer.grad_scale = torch.tensor(1 / STEP["factor"])
    optimizer.found_inf = torch.tensor(0.0)
    weights = {p: p.detach().clone() for p in module.parameters()}
    check.before(parts.to_save(), parts.gradient)
    with torch.no_grad():
        if wrong and when == "before":
            wrong(optimizer, weights)
        optimizer.step()
        if wrong and when == "after":
            wrong(optimizer, weights)
    check.after(Step(count=4, **STEP))


@pytest.mark.parametrize("name", SPECS)
def test_a_right_optimizer_passes(name, caplog):
    caplog.set_level(logging.INFO, logger="llmtrain")
    first_step(SPECS[name])
    groups = [r.getMessage().split(": ")[1] for r in caplog.records]
    assert groups == (
        ["decay", "no_decay"] if name == "adamw" else ["matrices", "decay", "no_decay"]
    )
    assert all("relative error" in r.getMessage() for r in caplog.records)


def count_off_by_one(optimizer, weights) -> None:
    for state in optimizer.state.values():
        state["step"] += 1


def other_groups_lr(optimizer, weights) -> None:
    first, *rest = optimizer.param_groups
    lr = rest[0]["lr"]
    rest[0]["lr"] = 2 * lr if first["lr"] == lr else first["lr"]


def decay_twice(optimizer, weights) -> None:
    group = optimizer.param_groups[0]
    for parameter in group["params"]:
        parameter -= group["lr"] * group["weight_decay"] * weights[parameter]


def decay_of_norms(optimizer, weights) -> None:
    group = optimizer.param_groups[-1]
    for parameter in group["params"]:
        parameter -= group["lr"] * 0.1 * weights[parameter]


def clipped_update(optimizer, weights) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.copy_(weights[p] + STEP["factor"] * (p - weights[p]))


def no_clipping(optimizer, weights) -> None:
    optimizer.grad_scale.fill_(1.0)


def momentum_lost(optimizer, weights) -> None:
    for state in optimizer.state.values():
        state["momentum" if "momentum" in state else "exp_avg"].zero_()


def nothing_done(optimizer, weights) -> None:
    for parameter, weight in weights.items():
        parameter.copy_(weight)


def not_a_number(optimizer, weights) -> None:
    optimizer.param_groups[-1]["params"][0][0] = float("nan")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("wrong", "when", "group", "says"),
    [
        (count_off_by_one, "before", "decay", "an update of rms"),
        (other_groups_lr, "before", "decay", "an update of rms"),
        (decay_twice, "after", "first", "an update of rms|a decay of"),
        (decay_of_norms, "after", "no_decay", "an update of rms"),
        (clipped_update, "after", "first", "an update of"),
        (no_clipping, "before", "first", "an update of|a state"),
        (momentum_lost, "after", "first", "a state"),
        (nothing_done, "after", "first", "an update of"),
        (not_a_number, "after", "no_decay", "an update of rms nan"),
    ],
)
def test_a_wrong_optimizer_is_named(name, wrong, when, group, says):
    group = {"first": "decay" if name == "adamw" else "matrices"}.get(group, group)
    if name == "adamw" and wrong is other_groups_lr:
        group = "no_decay"
    with pytest.raises(WrongUpdate, match=rf"group '{group}', \S+: got ({says})"):
        first_step(SPECS[name], wrong, when=when)


def test_scaling_of_another_mode_is_noticed():
    def build_original(optimizer, weights):
        optimizer.scale_of = copy.copy(ORIGINAL.build(Model()).scale_of)

    for spec in (MUON, BF16):
        with pytest.raises(WrongUpdate, match="group 'matrices'"):
            first_step(spec, build_original, when="before")


def test_what_float32_cannot_show_is_allowed():
    """The first step of a long warmup: changes near the last place of the weights."""
    small = AdamW(**{**vars(ADAMW), "lr": 2e-8})
    first_step(small)
    with pytest.raises(WrongUpdate, match="expected"):
        first_step(AdamW(**{**vars(ADAMW), "lr": 1e-5}), nothing_done)


def test_sample():
    """Largest, smallest, then up from the smallest, each within its cap."""
    assert within([5, 1, 9, 2, 7], lambda n: n, 13) == [9, 1, 2]
    assert within([5], lambda n: n, 1) == [5]
    module = Model()
    check = OptimizerCheck(MUON, module, elements=30_000, world=ALONE, device=CPU)
    sizes = {(p.group, p.name): p.matrix.numel for p in check.parts}
    assert sizes["decay", "head.weight"] == 250  # a quarter of a third
    assert sizes["no_decay", "embedding.weight"] == 250
    assert sizes["no_decay", "norm.weight"] == 64
    assert {n: s for (g, n), s in sizes.items() if g == "matrices"} == {
        "up.weight": 12800,
        "down.weight": 12800,
    }
