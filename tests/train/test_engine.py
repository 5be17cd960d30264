"""The engine against plain PyTorch, over ZeRO stages, ranks, checkpoints and resumes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

WORKERS = Path(__file__).parent / "workers"
STAGES = ("0", "1", "1overlap", "2", "2overlap", "3", "3overlap")
CROSSINGS = (("1", "3"), ("3", "2"), ("2", "0"), ("0", "1"))
RANKS = (1, 2)
ROWS, STEPS, SAVE_AT, BAD_STEP, CLIP = 8, 6, 3, 4, 0.4


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, WORKERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = load("tiny")
whole, equal = load("dumps").whole, load("dumps").equal


@pytest.fixture(scope="module")
def outputs(workers, tmp_path_factory) -> dict[int, Path]:
    """Ranks -> output folder of engine_worker.py; each also loads the other's checkpoints."""
    folder = tmp_path_factory.mktemp("engine")
    found = {ranks: folder / f"ranks{ranks}" for ranks in RANKS}
    for path in found.values():
        path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "compiled"))
        patch.setenv("PATH", "")  # no compiler either
        workers("engine_worker.py", 2, found[2])
        workers("engine_worker.py", 1, found[1], found[2])
    return found


def summary(outputs: dict[int, Path], ranks: int, stage: str) -> dict:
    return json.loads((outputs[ranks] / f"stage{stage}.json").read_text())


@pytest.fixture(scope="module")
def reference() -> tuple[list[dict], dict[tuple[str, str], Tensor]]:
    """The same steps with an unfused AdamW, torch's clipping and one batch: log and state."""
    module, _ = tiny.build()
    named = dict(module.named_parameters())
    plain = [n for n in named if named[n].ndim > 1 and "embedding" not in n and "gate" not in n]
    groups = [
        {"params": [named[n] for n in plain], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    log = []
    for step in range(STEPS):
        (micro,) = tiny.micro_batches(step, rows=ROWS, rank=0, size=1, micro_rows=ROWS)
        if step == BAD_STEP:
            log.append({"applied": False})
            continue
        module.model.use_sometimes = step % 2 == 0
        loss_sum, sums, _ = module(micro)
        loss = loss_sum / micro.weights_BT.sum()
        loss.backward()
        for parameter in module.parameters():
            if parameter.grad is None:  # no gradient is a gradient of zero
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        log.append(
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "applied": True,
                "bits_per_byte": (sums[1] / math.log(2) / sums[3]).item(),
            }
        )
    state = {}
    for name, parameter in named.items():
        state["param", name] = parameter.detach().flatten()
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind, name] = optimizer.state[parameter][kind].flatten()
    return log, state


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_steps_equal_plain_adamw(outputs, reference, stage, ranks):
    log, state = reference
    seen = summary(outputs, ranks, stage)
    for ours, plain in zip(seen["log"], log, strict=True):
        assert ours["applied"] == plain["applied"]
        if plain["applied"]:
            for name in ("loss", "grad_norm", "bits_per_byte"):
                assert ours[name] == pytest.approx(plain[name], rel=2e-6), name
    assert min(entry["grad_norm"] for entry in log if entry["applied"]) > CLIP  # clipping acted
    assert seen["steps"] == STEPS - 1
    ours = whole(outputs[ranks], f"stage{stage}")
    assert ours.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_skipped_step_changes_nothing_and_stop_reaches_all(outputs, stage, ranks):
    seen = summary(outputs, ranks, stage)
    assert [entry["applied"] for entry in seen["log"]].index(False) == BAD_STEP
    assert math.isnan(seen["log"][BAD_STEP]["grad_norm"])
    assert [entry["stop"] for entry in seen["log"]] == [True] + [False] * (STEPS - 1)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_for_bit(outputs, stage, ranks):
    """From another initialisation: the loss sequence, weights, moments and random draws."""
    seen = summary(outputs, ranks, stage)
    # repr: NaN (the skipped step) equals itself, and floats are compared exactly
    assert repr(seen["resumed"]) == repr(seen["log"][SAVE_AT:])
    assert seen["same_draw"]
    folder = outputs[ranks]
    assert equal(whole(folder, f"stage{stage}-resumed"), whole(folder, f"stage{stage}"))
    assert not equal(whole(folder, f"stage{stage}-saved"), whole(folder, f"stage{stage}"))


@pytest.mark.parametrize(("source", "stage"), CROSSINGS)
@pytest.mark.parametrize(("wrote", "read"), [(1, 1), (2, 2), (2, 1)])
def test_any_stage_and_world_reads_any_checkpoint(outputs, source, stage, wrote, read):
    saved = whole(outputs[wrote], f"stage{source}-saved")
    assert saved
    loaded = whole(outputs[read], f"stage{stage}-from{source}{outputs[wrote].name}")
    assert equal(loaded, saved)


def test_nothing_is_compiled(outputs):
    """DeepSpeed would build its shared-memory collectives at the first use on a CPU."""
    assert not (outputs[1].parent / "compiled").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_agree_to_reduction_noise(outputs, stage):
    one, two = (summary(outputs, ranks, stage) for ranks in RANKS)
    for a, b in zip(one["log"], two["log"]):
        if a["applied"]:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    for name, value in one["evaluated"].items():
        assert value == pytest.approx(two["evaluated"][name], rel=1e-6), name
