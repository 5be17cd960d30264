"""Copies of weights give the same bits as casts; float8 goes where it should."""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from llmtrain.context import SequenceContext
from llmtrain.model import linear as linear_module
from llmtrain.model.linear import Linear
from llmtrain.objectives.causal import Causal
from llmtrain.train.copies import WeightCopies, block_linears, use_float8
from llmtrain.train.loop import train
from llmtrain.train.zero import Zero0, Zero1, Zero3, for_ranks

SMALL = (
    "model.d_model=128",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=256",
    "model.tie_embeddings=false",
)


def step(model: nn.Module, function=None) -> list[torch.Tensor]:
    tokens = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    out = (function or Causal())(
        model, tokens, tokens.roll(-1, 1), torch.ones(2, 24), SequenceContext.dense(2, 24)
    )
    out.loss_sum.backward()
    return [out.loss_sum.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_same_bits_as_casting(build_model, checkpointing):
    model = build_model(*SMALL, dtype=torch.bfloat16)
    model.stack.activation_checkpointing = checkpointing
    expected = step(model)
    copies = WeightCopies(model, torch.bfloat16)
    assert len(copies.plain) == 2 * 6 == len(block_linears(model))
    for linear in copies.plain:
        assert linear.weight_copy is not None
        linear.weight_copy.fill_(float("nan"))
    copies.refresh()
    for got, want in zip(step(model), expected, strict=True):
        assert torch.equal(got, want)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    stale = step(model)
    copies.refresh()
    fresh = step(model)
    assert not torch.equal(stale[0], fresh[0])
    copies.remove()
    for got, want in zip(step(model), fresh, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_products_as_on_a_gpu_follow_casts(build_model, monkeypatch, checkpointing):
    """What a GPU takes: joined input gradients, and weights' gradients straight into float32."""
    torch._dynamo.reset()
    model = build_model(*SMALL, dtype=torch.bfloat16)
    model.stack.activation_checkpointing = checkpointing
    expected = step(model)
    WeightCopies(model, torch.bfloat16).refresh()
    taken = []

    def on_gpu(layer, x):
        taken.append(layer)
        return layer.weight_copy is not None and layer.weight_copy.dtype == x.dtype

    monkeypatch.setattr(linear_module, "takes_copy", on_gpu)
    eager = step(model)
    assert set(block_linears(model).values()) <= set(taken)
    for block in model.stack.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = step(model)
    for mine, again, want in zip(eager, compiled, expected, strict=True):
        assert (mine - want).norm() <= 0.02 * want.norm()
        torch.testing.assert_close(again, mine, rtol=0, atol=0)


def test_no_copies_in_float32(build_model):
    copies = WeightCopies(build_model(*SMALL, dtype=torch.float32), torch.float32)
    assert copies.linears == []
    copies.refresh()


@pytest.mark.parametrize("scaling", [None, "tensorwise"])
def test_blocks_with_copies_share_one_graph(build_model, scaling):
    torch._dynamo.reset()
    model = build_model(*SMALL, dtype=torch.bfloat16)
    if scaling:
        use_float8(model, scaling)
    expected = step(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.stack.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    WeightCopies(model, torch.bfloat16).refresh()
    for got, want in zip(step(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_float8_is_near_bf16_and_the_same_with_copies(build_model, scaling):
    exact = step(build_model(*SMALL, dtype=torch.float64))
    model = build_model(*SMALL, dtype=torch.bfloat16)
    assert use_float8(model, scaling) == 2 * 4  # k and v are 64 wide
    rounded = step(model)
    WeightCopies(model, torch.bfloat16).refresh()
    for ours, before, true in zip(step(model), rounded, exact, strict=True):
        assert torch.equal(ours, before)
        assert ((ours.double() - true).norm() / true.norm()).item() < 0.2
    model.eval()
    before = step(model)
    use_float8(model, scaling, backend="emulated")
    for ours, theirs in zip(step(model), before, strict=True):
        assert torch.equal(ours, theirs)  # validation is in bf16


def test_float8_needs_wide_layers(build_model):
    model = build_model("model.d_model=48", "model.n_heads=4", "model.n_kv_heads=2")
    with pytest.raises(ValueError, match=r"none of \d+ linear layers .* set train.precision=bf16"):
        use_float8(model, "tensorwise")


def test_float8_leaves_out_what_is_sensitive(build_model):
    model = build_model(*SMALL, channel="moe", dtype=torch.bfloat16)
    use_float8(model, "tensorwise")
    chosen = {n for n, m in model.named_modules() if isinstance(m, Linear) and m.float8}
    assert chosen
    assert not [name for name in chosen if "router" in name or "head" in name]


def test_float8_asks_the_device_first(configure):
    with pytest.raises(ValueError, match=r"train.precision=fp8: cpu has no float8 products"):
        train(configure("run", "train.precision=fp8"))


def test_float8_learns_like_bf16(build_model):
    """The same batch again and again, in both precisions from the same weights."""
    losses = {}
    for scaling in (None, "tensorwise"):
        model = build_model(*SMALL, dtype=torch.bfloat16)
        if scaling:
            use_float8(model, scaling)
        copies = WeightCopies(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[scaling] = []
        for _ in range(12):
            copies.refresh()
            losses[scaling].append(step(model)[0].item() / 48)
            optimizer.step()
    plain, rounded = (torch.tensor(values) for values in losses.values())
    assert plain[-1] < 0.8 * plain[0]
    assert ((plain - rounded).abs() < 0.02 * plain[0]).all()


def test_one_rank_divides_nothing():
    one = Zero1(communication_dtype="fp32", reduce_bucket_size=1, overlap_comm=False)
    assert for_ranks(one, 1) == Zero0(communication_dtype="fp32")
    assert for_ranks(one, 2) is one
    three = Zero3.__new__(Zero3)
    assert for_ranks(three, 1) is three


def test_training_at_stage_1_alone_is_stage_0(configure, tmp_path):
    """The same losses to the last bit, and a checkpoint that the other reads."""
    lines = {}
    for stage in ("zero0", "zero1"):
        train(configure(stage, f"deepspeed={stage}", "train.precision=bf16"))
        read = (tmp_path / stage / "ledger.jsonl").read_text().splitlines()
        lines[stage] = [json.loads(line) for line in read]
        start = json.loads((tmp_path / stage / "starts.jsonl").read_text().splitlines()[0])
        assert start["deepspeed"]["zero_optimization"]["stage"] == 0
    assert lines["zero0"] == lines["zero1"]
