"""A mixture of experts in the trainer: loads of whole steps, its bias, checkpoints and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.channels.moe import MoE
from llmtrain.checkpoint import FragmentReader, load_model
from llmtrain.train.loop import train

RANKS, STEPS, BAD_STEP, LAYERS, EXPERTS, SPEED = (1, 2), 12, 3, 2, 4, 0.01
PAIRS = 256 * 2  # tokens of a step, experts of a token
MOE = (
    "channel=moe",
    f"channel.n_experts={EXPERTS}",
    "channel.score=sigmoid",
    f"channel.bias_update_speed={SPEED}",
    "channel.noise=0.1",
    "channel.n_shared=1",
    "channel.capacity_factor=1.05",
    "train.activation_checkpointing=full",
    "train.micro_batch=2",
    "train.log_every=1",
)


@pytest.fixture(scope="module")
def outputs(workers, corpus, small, tmp_path_factory) -> dict[int, Path]:
    """Ranks -> output folder of moe_worker.py."""
    folder = tmp_path_factory.mktemp("moe")
    found = {ranks: folder / f"ranks{ranks}" for ranks in RANKS}
    for ranks, path in found.items():
        path.mkdir()
        workers("moe_worker.py", ranks, path, *corpus, *small, *MOE)
    return found


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and moment of a checkpoint, flattened."""
    reader, found = FragmentReader(path), {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            size = torch.Size(reader.manifest.parameters[name]).numel()
            found[f"{kind}|{name}"] = out = torch.empty(size)
            reader.read(kind, name, 0, out)
    return found


def checkpoint_at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def biases(run_dir: Path, step: int) -> list[torch.Tensor]:
    found = tensors(checkpoint_at(run_dir, step))
    names = sorted(name for name in found if name.endswith("expert_bias"))
    assert len(names) == LAYERS
    return [found[name] for name in names]


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def loads(folder: Path, rank: int) -> torch.Tensor:
    """[step, layer, expert]"""
    text = (folder / f"loads-rank{rank}.json").read_text()
    return torch.tensor(json.loads(text), dtype=torch.float64).view(STEPS, LAYERS, EXPERTS)


@pytest.mark.parametrize("ranks", RANKS)
def test_loads_are_those_of_the_whole_step_on_every_rank(outputs, ranks):
    """Over micro-batches and ranks; zeros after the skipped step."""
    found = [loads(outputs[ranks], rank) for rank in range(ranks)]
    assert all(other.equal(found[0]) for other in found)
    expected = torch.full((STEPS, LAYERS), float(PAIRS), dtype=torch.float64)
    expected[BAD_STEP - 1] = 0
    assert found[0].sum(dim=-1).equal(expected)


@pytest.mark.parametrize("ranks", RANKS)
def test_bias_follows_the_loads(outputs, ranks):
    found = loads(outputs[ranks], 0)
    moved = SPEED * (found.mean(dim=-1, keepdim=True) - found).sign().to(torch.float32)
    for step in (5, STEPS):
        bias = torch.zeros(LAYERS, EXPERTS)
        for i in range(step):
            bias += moved[i]
        assert torch.stack(biases(outputs[ranks] / "straight", step)).equal(bias)
        assert bias.abs().max() > 0


@pytest.mark.parametrize("ranks", RANKS)
def test_resume_is_bit_for_bit(outputs, ranks):
    straight, resumed = (outputs[ranks] / name for name in ("straight", "resumed"))
    one, two = (tensors(checkpoint_at(run, STEPS)) for run in (straight, resumed))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    ours, theirs = (
        {line["step"]: (line["loss"], line["grad_norm"]) for line in lines(run, "ledger")}
        for run in (straight, resumed)
    )
    assert theirs == {step: values for step, values in ours.items() if step > 5}


@pytest.mark.parametrize("ranks", RANKS)
def test_metrics_are_those_of_the_step(outputs, ranks):
    metrics = lines(outputs[ranks] / "straight", "metrics")
    train_lines = [line for line in metrics if line["kind"] == "train"]
    found = loads(outputs[ranks], 0)
    for line in train_lines:
        if line["step"] == BAD_STEP:
            continue
        for layer in range(LAYERS):
            load_E = found[line["step"] - 1, layer]
            place = f"metric/l{layer:02d}"
            assert line[f"{place}/max_load"] == pytest.approx((load_E.max() / load_E.mean()).item())
            assert 0 < line[f"{place}/load_entropy"] <= 1
            assert 0 < line[f"{place}/router_entropy"] <= 1
            assert line[f"{place}/dropped"] >= 0
        assert line["loss/balance"] == pytest.approx(0.01 * LAYERS, rel=0.5)
        assert not any(key.startswith("sum/") for key in line)
    assert sum(line.get("metric/l01/dropped", 0) for line in train_lines) > 0


def test_zero3_is_as_zero1_on_each_number_of_ranks(outputs):
    """It sees no bad step, so that only what is before it can be compared. The noise is that of
    the ranks' generators, which do not depend on the stage."""
    for ranks in RANKS:
        one, three = (lines(outputs[ranks] / run, "ledger") for run in ("straight", "zero3"))
        for ours, theirs in zip(one[: BAD_STEP - 1], three):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert len(three) == STEPS


def test_trained_model_loads_with_its_bias(outputs):
    model = load_model(outputs[2] / "straight", device="cpu").model
    found = [block.channel.router.expert_bias for block in model.stack.blocks]
    for ours, saved in zip(found, biases(outputs[2] / "straight", STEPS), strict=True):
        assert ours.equal(saved)
    assert not model.training  # no noise, no capacity


def test_loads_of_repeated_layers_and_of_further_token_modules(configure, tmp_path):
    """A core applied r times has r times the pairs, under one place; a module has its own."""
    steps = ("train.total_tokens=1024", "train.save_every=100", "train.val_every=100")
    stack = ("stack=recurrent_depth", "stack.sampling=fixed", "stack.repeats=3", "model.n_layers=3")
    seen = {}

    def record(channel, sums, after_step=MoE.after_step):
        seen.setdefault(id(channel), []).append(sums["load"].sum().item())
        return after_step(channel, sums)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "after_step", record)
        train(configure("run", *MOE, *stack, *steps, "objective=multi_token"))
    assert list(seen.values()) == [[float(n * PAIRS)] * 4 for n in (1, 3, 1, 1)]
    last = [line for line in lines(tmp_path / "run", "metrics") if line["kind"] == "train"][-1]
    places = {key.split("/")[1] for key in last if key.endswith("max_load")}
    assert places == {"l00", "l01", "l02", "mtp0"}
    found = tensors(checkpoint_at(tmp_path / "run", 4))
    moved = [name for name in found if name.endswith("expert_bias") and found[name].any()]
    assert len(moved) == 4


@pytest.mark.slow
def test_compiled_follows_eager(configure, tmp_path):
    quiet = [knob for knob in MOE if "noise" not in knob and "checkpointing" not in knob]
    eager = train(configure("eager", *quiet))
    compiled = train(configure("compiled", *quiet, "train.compile=model"))
    assert compiled["val"]["loss"] == pytest.approx(eager["val"]["loss"], rel=1e-3)
    one, two = (lines(tmp_path / name, "metrics") for name in ("eager", "compiled"))
    assert {key for line in one for key in line} == {key for line in two for key in line}
