"""Passes as CUDA graphs: the same training, bit for bit, and what cannot be recorded is not.

On a CPU a recording is a function that is called again: all but the graph itself is tried."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.data.batch import MicroBatch
from llmtrain.train import graphs
from llmtrain.train.graphs import MicroGraphs, Static, signature, tensors, why_not, with_tensors
from llmtrain.train.loop import train
from llmtrain.train.setup import Setup

CPU = torch.device("cpu")
# Two micro-batches a step; the second step's gradients are spoiled, and it is skipped.
CHANGES = ("train.total_tokens=2048", "train.save_every=4", "guard.inject=[nan_gradient@6]")


class Again:
    """A recording that computes anew."""

    made = 0

    def __init__(self, work, pool):
        self.work, self.pool = work, pool
        Again.made += 1

    def replay(self):
        return self.work()


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def weights(run_dir):
    return {
        path.relative_to(run_dir): path.read_bytes()
        for path in sorted((run_dir / "checkpoints").rglob("*.safetensors"))
    }


def run(corpus, small, run_dir, *changes):
    config = compose("train", [*corpus, *small, *CHANGES, f"run_dir={run_dir}", *changes])
    assert train(config)["finished"]
    return losses(run_dir), weights(run_dir)


def test_the_same_training(corpus, small, tmp_path, monkeypatch, caplog):
    """Of passes as ever, and of those that add to gradients of their own."""
    plain = run(corpus, small, tmp_path / "plain")
    monkeypatch.setattr(graphs, "Recorded", Again)
    monkeypatch.setattr(Setup, "graphs", lambda self: "auto")
    monkeypatch.setattr(Again, "made", 0)
    caplog.set_level("INFO", "llmtrain")
    recorded = run(corpus, small, tmp_path / "recorded")
    assert Again.made == 1
    assert "recorded the pass of a micro-batch, 1 by now" in caplog.text
    assert plain[0]
    assert len(plain[1]) >= 2
    assert recorded == plain


def dense(rows, tokens, **changes):
    zeros = torch.zeros(rows, tokens, dtype=torch.int64)
    ctx = SequenceContext.dense(rows, tokens)
    given = {"tokens_BT": zeros, "targets_BT": zeros, "weights_BT": zeros.float(), "ctx": ctx}
    return MicroBatch(**{**given, **changes})


def test_inputs_keep_shapes_and_strides():
    micro = dense(3, 5)
    statics = [Static(z) for z in tensors(micro)]
    made = with_tensors(micro, (static.tensor for static in statics))
    assert signature(made) == signature(micro)
    assert made.ctx.positions_BT.stride() == (0, 1)
    assert len(statics) == 4
    other = dense(3, 5, tokens_BT=torch.arange(15).view(3, 5))
    for static, given in zip(statics, tensors(other), strict=True):
        static.copy(given)
    assert torch.equal(made.tokens_BT, other.tokens_BT)
    assert torch.equal(made.ctx.positions_BT, other.ctx.positions_BT)


def test_signatures_tell_kinds_apart():
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[0, 3] = True
    packed = dense(2, 8, ctx=SequenceContext.packed(starts))
    different = [dense(2, 8), dense(2, 4), packed]
    different.append(dense(2, 8, ctx=SequenceContext.dense(2, 8, prefix_tokens=4)))
    assert len({signature(micro) for micro in different}) == 4
    assert signature(dense(2, 8)) == signature(dense(2, 8))


class Counted:
    """A linear model's passes, which count what ran."""

    def __init__(self):
        self.module = nn.Linear(5, 1, bias=False)
        self.unused = nn.Linear(2, 2)
        self.eagerly, self.plainly = 0, 0

    def compute(self, micro):
        loss = self.module(micro.weights_BT).sum()
        loss.backward()
        return loss.detach()[None], {"aux": loss.detach()}

    def eager(self, micro):
        self.eagerly += 1
        return self.compute(micro)

    def plain(self, micro):
        self.plainly += 1
        return self.compute(micro)

    def graphs(self, **options):
        both = nn.ModuleList([self.module, self.unused])
        return MicroGraphs(both, eager=self.eager, plain=self.plain, **options)


def test_gradients_add_up_over_both_kinds(monkeypatch):
    """A step may begin with a pass as ever and go on with recorded ones, of several kinds."""
    monkeypatch.setattr(graphs, "Recorded", Again)
    counted = Counted()
    made = counted.graphs()
    for step in range(3):
        sums = []
        for rows in (2, 3, 2, 3):
            sums.append(made.run(dense(rows, 5, weights_BT=torch.full((rows, 5), 1.0 + step))))
        assert torch.equal(counted.module.weight.grad, torch.full((1, 5), 10 * (1.0 + step)))
        weight = counted.module.weight.sum().item()
        for (total, aux), rows in zip(sums, (2, 3, 2, 3), strict=True):
            torch.testing.assert_close(
                total.item(), rows * (1.0 + step) * weight, rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(aux["aux"].item(), total.item())
        for module in (counted.module, counted.unused):
            module.zero_grad(set_to_none=True)
    assert (counted.eagerly, counted.plainly) == (4, 8)
    assert made.recorded == 2


def test_results_are_not_written_again(monkeypatch):
    monkeypatch.setattr(graphs, "Recorded", lambda work, pool: Fixed())
    made = Counted().graphs()
    for _ in range(2):
        made.run(dense(1, 5))
    first, aux = made.run(dense(1, 5))
    made.run(dense(1, 5))
    assert (first.item(), aux["aux"].item()) == (1.0, 1.0)


class Fixed:
    """Writes each result over the last, as a graph does."""

    def __init__(self):
        self.pool, self.made = None, (torch.zeros(1), {"aux": torch.zeros(())})

    def replay(self):
        self.made[0].add_(1)
        self.made[1]["aux"].add_(1)
        return self.made


def test_too_many_kinds(monkeypatch):
    monkeypatch.setattr(graphs, "Recorded", Again)
    counted = Counted()
    made = counted.graphs()
    for _ in range(4):
        for rows in range(1, graphs.MOST + 3):
            made.run(dense(rows, 5))
    assert made.recorded == graphs.MOST
    assert counted.eagerly == 2 * graphs.MOST + 4 * 2


def test_what_waits_for_the_device_is_not_recorded(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    caplog.set_level("INFO", "llmtrain")
    for required in (False, True):
        counted = Counted()

        def waits(micro, counted=counted):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
            return counted.compute(micro)

        counted.eager = waits
        made = counted.graphs(required=required)
        made.run(dense(1, 5))
        if required:
            with pytest.raises(ValueError, match=r"cuda_graphs=always: the pass waits for the dev"):
                made.run(dense(1, 5))
            continue
        for _ in range(3):
            made.run(dense(1, 5))
        assert (made.recorded, counted.plainly) == (0, 0)
        assert caplog.text.count("none, as the pass waits for the device") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"device": CPU}, "device is cpu"),
        ({"ranks": 2}, "2 ranks sum gradients"),
        ({"stage": 3}, "ZeRO stage 3"),
        ({"checkpointing": "full"}, "activation_checkpointing"),
    ],
)
def test_why_not(changes, said):
    given = {"ranks": 1, "stage": 0, "device": torch.device("cuda"), "checkpointing": "none"}
    reason = why_not(**{**given, **changes})
    assert reason is None if said is None else said in reason


def test_always_on_a_cpu_is_an_error(corpus, small, tmp_path):
    overrides = [*corpus, *small, f"run_dir={tmp_path}", "train.cuda_graphs=always"]
    with pytest.raises(ValueError, match=r"train.cuda_graphs=always: train.device is cpu"):
        train(compose("train", overrides))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["none", "blocks"])
@pytest.mark.parametrize("masked", [True, False])
def test_on_a_gpu(corpus, small, tmp_path, compiled, masked, caplog):
    """Losses, norms and weights of a training with graphs are those of one without."""
    caplog.set_level("INFO", "llmtrain")
    on = ["train.device=cuda", "train.precision=bf16", f"train.compile={compiled}"]
    on += [f"train.mask_documents={masked}", "model.d_model=64", "model.n_heads=2"]
    found = [
        run(corpus, small, tmp_path / choice, *on, f"train.cuda_graphs={choice}")
        for choice in ("never", "always")
    ]
    assert "recorded the pass of a micro-batch" in caplog.text
    assert found[0] == found[1]
