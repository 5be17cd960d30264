"""stack=recurrent_depth from training to a continuation: depths drawn, resumed, and chosen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import FragmentReader, load_model
from llmtrain.config import compose
from llmtrain.continuation import continuations
from llmtrain.model.recurrent_depth import RecurrentDepth
from llmtrain.train.loop import train

DEPTH = ("stack=recurrent_depth", "model.n_layers=3", "stack.repeats=3", "stack.backprop_repeats=2")


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter and moment of a checkpoint, flattened."""
    reader = FragmentReader(path)
    found = {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            shape = torch.Size(reader.manifest.parameters[name])
            found[f"{kind}|{name}"] = out = torch.empty(shape.numel())
            reader.read(kind, name, 0, out)
    return found


@pytest.fixture
def depths(monkeypatch):
    """The (repeats, seeds of the latents) of every differentiated forward pass."""
    seen = []
    run = RecurrentDepth.run

    def recorded(self, x, ctx, walk):
        if torch.is_grad_enabled():
            seen.append((ctx.repeats, tuple(ctx.noise_seeds_B.tolist())))
        return run(self, x, ctx, walk)

    monkeypatch.setattr(RecurrentDepth, "run", recorded)
    return seen


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero3"])
def test_a_run_and_its_continuation_bit_for_bit(configure, tmp_path, depths, stage):
    options = (*DEPTH, f"deepspeed={stage}", "train.micro_batch=2")
    options += ("train.activation_checkpointing=full",) if stage == "zero3" else ()
    train(configure("run", *options))
    straight = list(depths)
    assert len({repeats for repeats, _ in straight}) > 2
    seeds = [seed for _, row_seeds in straight for seed in row_seeds]
    assert len(set(seeds)) == len(seeds)
    run_dir, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run_dir, again)
    for step in (10, 12):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    depths.clear()
    train(configure("again", *options))
    assert depths == straight[len(straight) * 5 // 12 :]
    assert lines(again, "ledger") == lines(run_dir, "ledger")
    last = "checkpoints/step-00000012"
    one, two = tensors(run_dir / last), tensors(again / last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_draws_do_not_depend_on_micro_batches(configure, tmp_path):
    """Depth and first latents of every row are those of the step, however its rows are divided."""
    options = (*DEPTH, "train.total_tokens=1024", "train.val_every=1000", "train.log_every=1")
    for rows in (8, 2):
        train(configure(f"rows{rows}", *options, f"train.micro_batch={rows}"))
    for one, other in zip(
        lines(tmp_path / "rows8", "ledger"), lines(tmp_path / "rows2", "ledger"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_compiled_blocks_follow_eager(configure, tmp_path):
    torch._dynamo.reset()
    options = (*DEPTH, "train.total_tokens=512", "train.val_every=1000", "train.log_every=1")
    train(configure("eager", *options))
    train(configure("blocks", *options, "train.compile=blocks"))
    for eager, blocks in zip(
        lines(tmp_path / "eager", "ledger"), lines(tmp_path / "blocks", "ledger"), strict=True
    ):
        assert blocks["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_depth_of_a_continuation(configure, tmp_path):
    train(configure("run", *DEPTH))
    run_dir = tmp_path / "run"

    def text(*knobs: str) -> str:
        typed = [f"checkpoint={run_dir}", "prompt=ta", "max_new_tokens=25", "temperature=0"]
        return continuations(compose("generate", [*typed, *knobs]))[0][1]

    assert text() == text("repeats=3") == text("exit_threshold=1e-9")
    loaded = load_model(run_dir)
    assert (loaded.model.stack.repeats, loaded.model.stack.exit_threshold) == (3, None)
    assert text("repeats=1", "exit_threshold=0.5") == text("repeats=1")
    assert text("repeats=12")

    train(configure("plain"))
    plain = [f"checkpoint={tmp_path / 'plain'}"]
    for knob in ("repeats=2", "exit_threshold=0.1"):
        with pytest.raises(ValueError, match="applied once, expected null"):
            continuations(compose("generate", [*plain, knob]))
