"""objective=multi_token from text to a continuation, as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import FragmentReader, load_model
from llmtrain.config import compose
from llmtrain.continuation import continuations
from llmtrain.data.batch import MicroBatch
from llmtrain.data.loader import TokenLoader
from llmtrain.model.block import Block
from llmtrain.objectives.multi_token import MultiToken
from llmtrain.train.loop import train

TWO = ("objective=multi_token", "objective.depth=2")


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


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_run_and_its_continuation_bit_for_bit(configure, tmp_path, stage):
    options = (*TWO, f"deepspeed={stage}", "objective.chunk_tokens=50")
    options += ("train.activation_checkpointing=full",) if stage == "zero3" else ()
    config = configure("run", *options)
    summary = train(config)
    run_dir, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run_dir, again)
    for step in (10, 12):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    train(configure("again", *options))
    assert lines(again, "starts")[1]["resumed_step"] == 5
    assert lines(again, "ledger") == lines(run_dir, "ledger")
    last = "checkpoints/step-00000012"
    one, two = tensors(run_dir / last), tensors(again / last)
    assert one.keys() == two.keys()
    assert {key.split("|")[1].split(".")[2] for key in one if ".mtp." in key} == {"0", "1"}
    assert all(torch.equal(one[key], two[key]) for key in one)

    logged = [line for line in lines(run_dir, "metrics") if line["kind"] == "train"]
    for j in (0, 1):
        ces = [line[f"metric/mtp{j}/ce"] for line in logged]
        assert ces[-1] < ces[0] - 0.1

    # the loss of the validation is the objective's of the loaded model, modules and all
    loaded = load_model(run_dir)
    loader = TokenLoader.open(Path(config["data"]["root"]) / "text", "val", seq_len=32, seed=0)
    batch = loader.batch(0, min(300 // 32, loader.rows_per_epoch))
    micro = MicroBatch.of(batch, mask_documents=True)
    arguments = (micro.tokens_BT, micro.targets_BT, micro.weights_BT, micro.ctx)
    with torch.no_grad():
        out = MultiToken(depth=2)(loaded.model, *arguments)
    nats = out.ce_sum / out.weight_sum
    assert summary["val"]["loss"] == pytest.approx(nats.item(), rel=1e-5)


def test_the_main_head_is_measured_as_with_next_token_prediction(configure, tmp_path):
    """The first step's bits per byte do not depend on the modules; its loss does."""
    firsts = []
    for name, options in (("causal", ()), ("further", TWO)):
        train(configure(name, "train.total_tokens=256", "train.log_every=1", *options))
        firsts += [line for line in lines(tmp_path / name, "metrics") if line["kind"] == "train"]
    causal, further = firsts
    assert further["bits_per_byte"] == pytest.approx(causal["bits_per_byte"], rel=1e-6)
    ces = [further[f"metric/mtp{j}/ce"] for j in (0, 1)]
    assert causal["loss"] < further["loss"] < causal["loss"] + 0.15 * sum(ces)


def test_modules_of_another_depth_are_refused(configure, tmp_path):
    train(configure("run", *TWO, "train.total_tokens=256"))
    message = r"made with another configuration: objective.depth: 2 then, 3 now"
    with pytest.raises(ValueError, match=message):
        train(configure("run", "objective=multi_token", "objective.depth=3"))


def llmtrain(*arguments: str) -> subprocess.CompletedProcess:
    # a training in this process leaves its rank's variables
    rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in rank}
    return subprocess.run(
        [sys.executable, "-m", "llmtrain.cli", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(corpus, small, tmp_path_factory) -> dict[str, Path]:
    """Runs of some seconds by the command: with two modules, with one, and with none."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["train.total_tokens=46080", "train.save_every=1000", "optimizer.lr=0.01"]
    kinds = {"two": TWO, "one": ("objective=multi_token",), "none": ("train.total_tokens=256",)}
    for name, options in kinds.items():
        done = llmtrain("train", *corpus, *small, *more, *options, f"run_dir={folder / name}")
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in kinds}


def continued(run_dir: Path, *knobs: str) -> list[str]:
    """What a user types after `llmtrain generate`."""
    return [f"checkpoint={run_dir}", "prompt=[ta, sho, '']", "max_new_tokens=60", *knobs]


SAID = re.compile(
    r"speculation: (\d+) of (\d+) drafted tokens accepted \(.*%\), (.*) tokens a forw"
)


@pytest.mark.parametrize(("name", "drafts"), [("two", 2), ("two", 1), ("one", 1), ("one", 3)])
def test_speculation_of_a_trained_model(trained, name, drafts, caplog):
    """The same greedy text from fewer forward passes; more right drafts than one in the 300 tokens
    of the vocabulary."""
    typed = continued(trained[name], "temperature=0", "device=cpu")
    plain = continuations(compose("generate", typed))
    with caplog.at_level("INFO", logger="llmtrain"):
        assert continuations(compose("generate", [*typed, f"speculate={drafts}"])) == plain
    accepted, drafted, rate = SAID.search(caplog.text).groups()
    assert int(accepted) > 0.1 * int(drafted) > 5
    assert float(rate) > 1.1


def test_the_command(trained):
    """Its text is that of a run without speculation; how well it went is said beside the text."""
    greedy = continued(trained["two"], "temperature=0")
    plain, fast = llmtrain("generate", *greedy), llmtrain("generate", *greedy, "speculate=2")
    assert plain.returncode == fast.returncode == 0, plain.stderr + fast.stderr
    assert fast.stdout == plain.stdout
    assert fast.stdout.count("-" * 60) == 3
    assert "speculation" not in plain.stderr
    assert SAID.search(fast.stderr)
    none = llmtrain("generate", *continued(trained["none"], "speculate=1"))
    assert none.returncode == 2
    assert "error: speculate: got 1 for a model without modules of multi-token" in none.stderr


def test_sampled_texts_of_a_trained_model(trained):
    knobs = ("temperature=0.9", "top_p=0.9", "speculate=2", "samples=2", "seed=5")
    typed = continued(trained["two"], *knobs)
    first, second = (continuations(compose("generate", typed)) for _ in range(2))
    assert first == second
    assert len({text for _, text in first}) == 6


def test_errors_of_speculation(trained):
    for run, knob, message in (
        ("two", "speculate=3", "speculate: got 3 for a model of 2 modules, expected 1 to 2"),
        ("two", "speculate=0", "speculate: got 0, expected more than 0"),
        ("two", "speculate=1.5", r"speculate: got 1.5 \(float\), expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            continuations(compose("generate", continued(trained[run], knob)))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["objective.depth=31"], r"objective.depth: got 31 with rows of 32 tokens, expected at m"),
        (["objective.depth=0"], r"objective=multi_token: depth: got 0, expected >= 1"),
        (["objective.depth=1.5"], r"objective.depth: got 1.5 \(float\), expected a whole number"),
        (["objective.loss_weight=0"], r"objective=multi_token: loss_weight: got 0"),
    ],
)
def test_errors_before_the_start(configure, typed, message):
    with pytest.raises(ValueError, match=message):
        configure("run", "objective=multi_token", *typed)


def test_blocks_of_modules_are_compiled(configure, tmp_path, monkeypatch):
    """compile=blocks takes the modules' blocks too, and gives the losses of the run without."""
    torch._dynamo.reset()
    compiled, compile_block = [], Block.compile

    def recorded(self, **knobs):
        compiled.append(self)
        compile_block(self, **knobs)

    monkeypatch.setattr(Block, "compile", recorded)
    options = (*TWO, "train.total_tokens=512", "train.val_every=1000", "train.log_every=1")
    train(configure("eager", *options))
    assert not compiled
    train(configure("blocks", *options, "train.compile=blocks"))
    assert len(compiled) == 2 + 2
    for eager, blocks in zip(
        lines(tmp_path / "eager", "ledger"), lines(tmp_path / "blocks", "ledger")
    ):
        assert blocks["loss"] == pytest.approx(eager["loss"], rel=1e-4)


def test_dry_run_counts_the_modules(corpus, small):
    config = compose("train", [*corpus, *small, *TWO])
    assert config["objective"]["depth"] == 2
    done = llmtrain("train", *corpus, *small, *TWO, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  mtp +\d", done.stdout, re.MULTILINE)
    assert "(three times the forward pass, multi-token prediction included)" in done.stdout
