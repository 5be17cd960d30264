"""The plan: its numbers are those of accounting on the model that the configuration builds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmtrain import accounting, build, cli
from llmtrain.config import compose
from llmtrain.plan import describe, make_plan, tokens_per_second


def test_numbers():
    config = compose("plan", ["model=gpt_124m", "deepspeed=zero2"])
    plan = make_plan(config, ranks=8)
    model = build.build_model(config, vocab_size=config["tokenizer"]["vocab_size"], device="meta")
    assert plan.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert plan.flops == accounting.flops_per_token(model, 1024)
    assert plan.train_flops == 3 * plan.flops
    assert plan.state_bytes[1024] == accounting.state_bytes(model, 1024)
    assert (plan.stage, plan.rows, plan.steps) == (2, 64, 153)
    assert plan.tokens == 153 * 65536


def test_memory_falls_with_the_stage_and_the_ranks():
    config = compose("plan", ["model=llama3_8b"])
    alone, eight = make_plan(config, ranks=1), make_plan(config, ranks=8)
    totals = [eight.memory[stage].total for stage in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert eight.memory[1].optimizer * 8 == alone.memory[1].optimizer
    assert replace(eight.memory[0], buffers=0) == alone.memory[0]  # one rank sums nothing


def test_one_more_row():
    config = compose("plan", ["train.micro_batch=2"])
    two = make_plan(config)
    config["train"]["micro_batch"] = 4
    four = make_plan(config)
    grown = four.memory[1].activations + four.memory[1].logits
    assert grown - two.memory[1].activations - two.memory[1].logits == 2 * two.row_bytes


def test_ranks_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"got 64 rows .* multiple of 48 ranks x 1 rows"):
        make_plan(compose("plan"), ranks=48)


def test_hours():
    config = compose("plan", ["plan.tokens_per_second=1000", "train.total_tokens=65536000"])
    plan = make_plan(config)
    rate = tokens_per_second(plan, config["plan"])
    assert rate == 1000
    assert "hours: 18.20 at 1,000 tokens/s" in describe(plan, rate)
    assert "hours" not in describe(plan)


def test_rate_of_a_device():
    config = compose("plan", ["plan.device_name=NVIDIA H100 80GB HBM3", "plan.mfu=0.5"])
    plan = make_plan(config, ranks=4)
    assert tokens_per_second(plan, config["plan"]) == 4 * 989e12 * 0.5 / plan.train_flops
    config["plan"]["device_name"] = "abacus"
    with pytest.raises(ValueError, match=r"'abacus' is not in the table.*plan.tokens_per_second"):
        tokens_per_second(plan, config["plan"])


def test_command_prints_it(capsys):
    assert cli.main(["plan", "model=gpt_124m", "plan.ranks=8"]) == 0
    out = capsys.readouterr().out
    total = make_plan(compose("plan", ["model=gpt_124m"])).parameters["total"]
    assert f"{total:,}" in out
    assert "active" not in out
    assert "memory of each of 8 ranks" in out


def test_parameters_of_a_token():
    plan = make_plan(compose("plan", ["channel=moe", "channel.n_experts=8", "channel.top_k=2"]))
    total = plan.parameters["total"]
    assert plan.active_parameters == total - 4 * 6 * 3 * 128 * 352
    share = 100 * plan.active_parameters / total
    assert f"  active      {plan.active_parameters:>16,}  {share:5.1f} %" in describe(plan)
