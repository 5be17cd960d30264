"""Width transfer in training: groups, Muon's updates, the check of the first update."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from llmtrain import build
from llmtrain.checkpoint import load_model
from llmtrain.distributed import World
from llmtrain.train import loop
from llmtrain.train.matrices import matrix_parameters
from llmtrain.train.partitions import Replicated
from llmtrain.train.reference import Step
from llmtrain.train.truth import OptimizerCheck, WrongUpdate

MUP = "model.mup_base_width=8"  # of the small model's 32


def test_groups_of_adamw(configure):
    config = configure("run", MUP, "channel=moe", "optimizer.lr=1e-2")
    model = build.build_model(config, vocab_size=300, device="meta")
    spec = build.part(config["optimizer"], "optimizer")
    groups = {group.name: group for group in spec.all_groups(model)}
    assert list(groups) == ["decay", "decay_width", "no_decay"]
    assert [g.lr for g in groups.values()] == [1e-2, 2.5e-3, 1e-2]
    assert [g.weight_decay for g in groups.values()] == [0.1, pytest.approx(0.4), 0.0]
    kinds = {name.rpartition("0.")[2] for name in groups["decay_width"].members if "0." in name}
    assert {"mixer.q_proj.weight", "channel.gate_up", "channel.router.weight"} <= kinds
    assert "embedding.weight" in groups["no_decay"].members
    members = [name for group in groups.values() for name in group.members]
    assert sorted(members) == sorted(name for name, _ in model.named_parameters())
    assert "decay_width    lr 0.0025" in spec.describe(model)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_update_of_muon(configure, scaling):
    """Its operator norm at the base, times sqrt(rows / cols) against there."""
    muon = ("optimizer=muon", f"optimizer.lr_scaling={scaling}", "mixer=mamba2", "mixer.d_state=8")
    sizes = ("mixer.head_dim=8", "model.ffn_hidden=48")
    models = {}
    for width, hidden in ((8, 12), (32, 48)):
        config = configure(
            "run", *muon, *sizes, MUP, f"model.d_model={width}", f"model.ffn_hidden={hidden}"
        )
        spec = build.part(config["optimizer"], "optimizer")
        model = build.build_model(config, vocab_size=300)
        optimizer = spec.build(model)
        scales = {
            name: [optimizer.scale_of(matrix) for matrix in cut]
            for name, cut in matrix_parameters(model).items()
        }
        models[width] = scales
    base, wide = (
        {name.removeprefix("stack.blocks.0.mixer."): x for name, x in models[w].items()}
        for w in (8, 32)
    )
    ratios = [b / a for a, b in zip(base["in_proj.weight"], wide["in_proj.weight"], strict=True)]
    assert ratios == pytest.approx([1, 1, 0.5, 0.5, 1])  # z, x, B, C, dt
    assert wide["out_proj.weight"] == pytest.approx(base["out_proj.weight"])


def trained(configure, name: str, *overrides: str) -> list[torch.Tensor]:
    loop.train(configure(name, "train.total_tokens=512", "train.val_every=10", *overrides))
    config = configure(name)
    return list(load_model(config["run_dir"]).model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_at_the_base_is_bit_for_bit_as_without(configure, optimizer):
    option = f"optimizer={optimizer}"
    plain = trained(configure, "plain", option)
    base = trained(configure, "base", option, "model.mup_base_width=32")
    assert all(torch.equal(a, b) for a, b in zip(plain, base, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_first_update_is_checked_with_the_rates_of_every_group(configure, caplog, optimizer):
    caplog.set_level(logging.INFO, logger="llmtrain")
    more = (f"optimizer={optimizer}", MUP, "channel=moe")
    loop.train(configure("run", "train.total_tokens=512", *more))
    checked = [r.getMessage() for r in caplog.records if "optimizer check" in r.getMessage()]
    names = [line.split(": ")[1] for line in checked]
    first = ["matrices"] if optimizer == "muon" else []
    assert names == [*first, "decay_width", "no_decay"]  # the router's rate is AdamW's in both


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizer_without_the_factors_is_found(configure, optimizer):
    config = configure("run", MUP, f"optimizer={optimizer}")
    model = build.build_model(config, vocab_size=300)
    spec = build.part(config["optimizer"], "optimizer")
    check = OptimizerCheck(
        spec,
        model,
        elements=100_000,
        world=World(rank=0, size=1, local_rank=0),
        device=torch.device("cpu"),
    )
    model.width = None
    built = spec.build(model)
    parts = Replicated(model, built, 0, 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    check.before(parts.to_save(), parts.gradient)
    built.step()
    with pytest.raises(WrongUpdate, match="expected"):
        check.after(Step(count=1, ratio=1.0, factor=1.0))
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
