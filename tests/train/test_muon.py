"""Muon: the rule of what is a matrix, steps against torch's, ZeRO stages and ranks alike."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from llmtrain_kernels.muon import COEFFICIENTS, EPS
from torch import Tensor, nn

from llmtrain import build
from llmtrain.checkpoint import FragmentReader
from llmtrain.config import compose
from llmtrain.distributed import World
from llmtrain.plan import make_plan
from llmtrain.train import newton_schulz
from llmtrain.train.loop import train
from llmtrain.train.matrices import Matrix, matrix_parameters
from llmtrain.train.matrix_homes import Partition, Shared
from llmtrain.train.muon import Muon
from llmtrain.train.newton_schulz import orthogonalise
from llmtrain.train.setup import Setup

RANKS = (1, 2, 3)


def load(name: str):
    """A module of workers/, whose modules import each other."""
    folder = str(Path(__file__).parent / "workers")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


tiny, tiny_muon, dumps, worker = (
    load(name) for name in ("tiny", "tiny_muon", "dumps", "muon_worker")
)


def matrices_of(model: str, *overrides: str) -> dict[str, list[tuple[int, int]]]:
    """Parameter -> shapes of its matrices, of the first layer of a configuration."""
    config = compose("train", [f"model={model}", *overrides])
    module = build.build_model(config, vocab_size=256, device="meta")
    cuts = matrix_parameters(module)
    return {
        name.removeprefix("stack.blocks.0."): [(m.rows, m.cols) for m in cut]
        for name, cut in cuts.items()
        if name.startswith("stack.blocks.0.")
    }


def test_rule_of_a_transformer():
    sizes = ["model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.ffn_hidden=48"]
    assert matrices_of("tiny", *sizes) == {
        "mixer.q_proj.weight": [(32, 32)],
        "mixer.k_proj.weight": [(16, 32)],
        "mixer.v_proj.weight": [(16, 32)],
        "mixer.out_proj.weight": [(32, 32)],
        "channel.gate_up.weight": [(48, 32)] * 2,
        "channel.down.weight": [(32, 48)],
    }


def test_rule_of_experts():
    more = ["channel=moe", "channel.n_experts=3", "channel.top_k=2", "channel.hidden=8"]
    more += ["channel.n_shared=1", "channel.shared_gate=true", "model.d_model=32"]
    found = matrices_of("tiny", *more, "model.n_heads=2", "model.n_kv_heads=2")
    assert found["channel.gate_up"] == [(8, 32)] * 6
    assert found["channel.down"] == [(32, 8)] * 3
    assert found["channel.shared.gate_up.weight"] == [(8, 32)] * 2
    assert "channel.router.weight" not in found
    assert "channel.shared_gate.weight" not in found


# Mixer -> parameters of it that are matrices, with their number; all others are AdamW's.
MIXERS = {
    "mamba": {"in_proj.weight": 2, "x_proj": 1, "out_proj.weight": 1},
    "mamba2": {"in_proj.weight": 5, "out_proj.weight": 1},
    "gated_deltanet": {"qkv_proj.weight": 3, "z_proj.weight": 1, "out_proj.weight": 1},
    "mla": {"q_up.weight": 1, "kv_down.weight": 2, "kv_up.weight": 1, "out_proj.weight": 1},
    "mlstm": {f"{name}_proj.weight": 1 for name in ("q", "k", "v", "o", "out")},
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_rule_of_mixers(mixer):
    found = matrices_of("tiny", f"mixer={mixer}")
    own = {n: len(m) for n, m in found.items() if n.startswith("mixer.")}
    expected = {f"mixer.{name}": count for name, count in MIXERS[mixer].items()}
    assert own == expected | {k: 1 for k in own if k == "mixer.q_down.weight"}


class Facts(nn.Module):
    def __init__(self, **facts: object) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 6))
        self.vector = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(3, 4)
        self.left_out = None
        for name, value in facts.items():
            setattr(self, name, value)


def test_facts():
    assert list(matrix_parameters(Facts())) == ["linear.weight"]
    assert list(matrix_parameters(Facts(matrices=("table",)))) == ["table", "linear.weight"]
    assert not matrix_parameters(Facts(no_matrices=("linear.weight", "left_out.weight")))
    listed = Facts(matrices=("table",), no_weight_decay=("table",))
    assert list(matrix_parameters(listed)) == ["linear.weight"]
    split = matrix_parameters(Facts(matrix_splits={"linear.weight": (1, 0, 3)}))
    assert split["linear.weight"] == [
        Matrix(start=0, rows=1, cols=3),
        Matrix(start=3, rows=3, cols=3),
    ]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"no_matrices": ("gate",)},
            r"Facts: no_matrices lists 'gate', but the module has no such",
        ),
        ({"matrices": ("vector",)}, r"vector: got shape \[4\], expected \[..., out, in\]"),
        (
            {"matrix_splits": {"linear.weight": (1, 2)}},
            r"linear.weight: matrix_splits gives \(1, 2\), expected .* sum up to 4",
        ),
    ],
)
def test_wrong_facts(facts, message):
    with pytest.raises(ValueError, match=message):
        matrix_parameters(Facts(**facts))


def polynomial(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz by singular values, in float64: what the iteration does to each of them."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(s.square().sum().sqrt().item(), EPS)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def test_orthogonalise(monkeypatch):
    shapes = [(5, 9), (9, 5), (7, 7), (5, 9), (1, 4), (9, 5), (5, 9)]
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for limit in (newton_schulz.BATCH_ELEMENTS, 100):  # 100: batches of two at most
        monkeypatch.setattr(newton_schulz, "BATCH_ELEMENTS", limit)
        found = orthogonalise(given, steps=5, dtype=torch.float64)
        for matrix, result in zip(given, found, strict=True):
            torch.testing.assert_close(result, polynomial(matrix), rtol=1e-9, atol=1e-11)
    values = torch.linalg.svdvals(
        orthogonalise([torch.randn(64, 96)], steps=5, dtype=torch.float32)[0]
    )
    assert 0.5 < values.min() < values.max() < 1.3
    (zero,) = orthogonalise([torch.zeros(3, 4)], steps=5, dtype=torch.bfloat16)
    assert zero.dtype == torch.bfloat16
    assert not zero.any()


def test_orthogonalise_in_float16_of_any_size():
    """Gradients far below and above what float16 holds: they are divided by their norms first."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    given = [(matrix * size).bfloat16() for size in (1e-30, 1e-6, 1.0, 1e15)]
    for z in given[1:]:
        (got,) = orthogonalise([z], steps=5, dtype=torch.float16)
        assert got.dtype == torch.float16
        expected = polynomial(z)
        assert (got.double() - expected).norm() <= 4e-3 * expected.norm()
    (tiny_one,) = orthogonalise(given[:1], steps=5, dtype=torch.float16)
    assert tiny_one.isfinite().all()


def pair(module: nn.Module, spec: Muon):
    """Torch's two optimizers on copies of the matrices and on the module's other parameters, as a
    function that takes the gradients of the module and makes a step of all its parameters."""
    cuts, groups = matrix_parameters(module), spec.groups(module)
    named = dict(module.named_parameters())
    copies = {
        name: [nn.Parameter(m.of(named[name].detach().flatten()).clone()) for m in cut]
        for name, cut in cuts.items()
    }
    muon = torch.optim.Muon(
        [p for own in copies.values() for p in own],
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        adjust_lr_fn=spec.lr_scaling,
    )
    rest = [
        {"params": list(groups["decay"].values()), "weight_decay": spec.weight_decay},
        {"params": list(groups["no_decay"].values()), "weight_decay": 0.0},
    ]
    betas = (spec.beta1, spec.beta2)
    adamw = torch.optim.AdamW(rest, lr=spec.adamw_lr, betas=betas, eps=spec.eps, foreach=False)

    def step(ratio: float) -> None:
        for name, own in copies.items():
            for copy, matrix in zip(own, cuts[name], strict=True):
                copy.grad = matrix.of(named[name].grad.flatten()).clone()
        for optimizer, lr in ((muon, spec.lr), (adamw, spec.adamw_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * ratio
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "bfloat16", Tensor.clone)  # torch's Muon would compute in it
            muon.step()
        adamw.step()
        with torch.no_grad():
            for name, own in copies.items():
                named[name].copy_(torch.cat([c.flatten() for c in own]).view_as(named[name]))

    def state() -> dict[tuple[str, str], Tensor]:
        found = {("param", name): p.detach().flatten() for name, p in named.items()}
        for name, own in copies.items():
            parts = [muon.state[c]["momentum_buffer"].flatten() for c in own]
            found["momentum", name] = torch.cat(parts)
        for name in named.keys() - copies.keys():
            for kind in ("exp_avg", "exp_avg_sq"):
                found[kind, name] = adamw.state[named[name]][kind].flatten()
        return found

    return step, state


@pytest.fixture(scope="module")
def reference() -> tuple[list[dict], dict[tuple[str, str], Tensor]]:
    """The worker's steps in one batch by torch's Muon, AdamW and clipping: log and state."""
    module, spec = tiny_muon.build()
    step_both, state = pair(module, spec)
    log = []
    for step in range(worker.STEPS):
        rows = worker.ROWS
        (micro,) = tiny.micro_batches(step, rows=rows, rank=0, size=1, micro_rows=rows)
        if step == worker.BAD_STEP:
            log.append({"applied": False})
            continue
        loss_sum, _, _ = module(micro)
        loss = loss_sum / micro.weights_BT.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), worker.CLIP)
        step_both(1 / (step + 1))
        module.zero_grad()
        log.append({"loss": loss.item(), "grad_norm": norm.item(), "applied": True})
    return log, state()


@pytest.fixture(scope="module")
def outputs(workers, tmp_path_factory) -> dict[int, Path]:
    """Ranks -> output folder of muon_worker.py; 2 ranks read what 3 wrote, 1 what 2 wrote."""
    folder = tmp_path_factory.mktemp("muon")
    found = {ranks: folder / f"ranks{ranks}" for ranks in RANKS}
    for path in found.values():
        path.mkdir()
    for ranks, others in ((3, []), (2, [3]), (1, [2])):
        workers("muon_worker.py", ranks, found[ranks], *(found[other] for other in others))
    return found


def close(ours: dict, expected: dict, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        scale = tensor.square().mean().sqrt().item()
        worst = (ours[key] - tensor).abs().max().item()
        assert worst <= tolerance * scale + 1e-9, (key, worst, scale)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", worker.STAGES)
def test_steps_equal_torch(outputs, reference, stage, ranks):
    log, state = reference
    seen = json.loads((outputs[ranks] / f"stage{stage}.json").read_text())
    for ours, plain in zip(seen["log"], log, strict=True):
        assert ours["applied"] == plain["applied"]
        if plain["applied"]:
            for name in ("loss", "grad_norm"):
                assert ours[name] == pytest.approx(plain[name], rel=1e-5), name
    assert min(entry["grad_norm"] for entry in log if entry["applied"]) > worker.CLIP
    assert seen["steps"] == worker.STEPS - 1
    close(dumps.whole(outputs[ranks], f"stage{stage}"), state, 2e-4)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", worker.STAGES)
def test_float16_is_the_same_at_all_stages_and_ranks(outputs, stage, ranks):
    """And near to the same steps in float32; the check of the first update passes."""
    found = dumps.whole(outputs[ranks], f"float16-{stage}")
    close(found, dumps.whole(outputs[1], "float16-0"), 2e-3)
    saved = dumps.whole(outputs[ranks], f"stage{stage}-saved")  # after as many steps
    assert worker.FLOAT16_STEPS == worker.SAVE_AT
    weights = [key for key in found if key[0] == "param"]
    close({k: found[k] for k in weights}, {k: saved[k] for k in weights}, 1e-2)
    assert any(not torch.equal(found[k], saved[k]) for k in weights)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("stage", worker.STAGES)
def test_skipped_step_changes_nothing_and_resume_is_bit_for_bit(outputs, stage, ranks):
    folder, name = outputs[ranks], f"stage{stage}"
    before, after = (dumps.whole(folder, f"{name}-{when}-bad") for when in ("before", "after"))
    assert dumps.equal(before, after)
    seen = json.loads((folder / f"{name}.json").read_text())
    assert repr(seen["resumed"]) == repr(seen["log"][worker.SAVE_AT :])  # repr: NaN equals itself
    end = dumps.whole(folder, name)
    assert dumps.equal(dumps.whole(folder, f"{name}-resumed"), end)
    assert not dumps.equal(dumps.whole(folder, f"{name}-saved"), end)


@pytest.mark.parametrize(("source", "stage"), worker.CROSSINGS)
@pytest.mark.parametrize(("wrote", "read"), [(3, 2), (2, 1)])
def test_any_stage_and_world_reads_any_checkpoint(outputs, source, stage, wrote, read):
    saved = dumps.whole(outputs[wrote], f"stage{source}-saved")
    key = f"{source}{outputs[wrote].name}"
    assert dumps.equal(dumps.whole(outputs[read], f"stage{stage}-from{key}"), saved)
    end = dumps.whole(outputs[wrote], f"stage{source}")
    close(dumps.whole(outputs[read], f"stage{stage}-continued{key}"), end, 2e-4)


@pytest.mark.parametrize("ranks", RANKS)
def test_flat_slices_taken_for_matrices_end_the_run_on_every_rank(outputs, ranks):
    for rank in range(ranks):
        text = (outputs[ranks] / f"flat-rank{rank}.txt").read_text()
        assert "group 'matrices', model.layers" in text
        assert "expected" in text


def gradients(module: nn.Module, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


@pytest.mark.parametrize(
    ("changed", "tolerance"),
    [
        ({"lr_scaling": "original"}, 1e-5),
        ({"nesterov": False}, 1e-5),
        ({"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}, 1e-5),
        ({"ns_dtype": "bf16"}, 1e-2),
        ({"ns_dtype": "fp16"}, 2e-3),
    ],
)
def test_knobs_equal_torch(changed, tolerance):
    module, spec = tiny_muon.build(**changed)
    other, _ = tiny_muon.build()
    optimizer = spec.build(module)
    step_both, _ = pair(other, spec)
    for step in range(3):
        gradients(module, step)
        gradients(other, step)
        optimizer.step()
        step_both(1.0)
    expected = dict(other.named_parameters())
    close(dict(module.named_parameters()), expected, tolerance)


def test_float64_equals_the_formula():
    module, spec = tiny_muon.build()
    module.double()
    named, cuts = dict(module.named_parameters()), matrix_parameters(module)
    weights = {name: named[name].detach().clone() for name in cuts}
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizer, mu = spec.build(module), spec.momentum
    for step in range(3):
        gradients(module, step)
        for name, cut in cuts.items():
            g = named[name].grad
            momenta[name] = mu * momenta[name] + (1 - mu) * g
            update = (mu * momenta[name] + (1 - mu) * g).flatten()
            weight = weights[name].view(-1)
            weight *= 1 - spec.lr * spec.weight_decay
            for matrix in cut:
                size = 0.2 * math.sqrt(max(matrix.rows, matrix.cols))
                matrix.of(weight).sub_(spec.lr * size * polynomial(matrix.of(update)))
        optimizer.step()
    close({name: named[name] for name in cuts}, weights, 1e-9)


def test_partition_exchanges_what_is_cut():
    """Every rank sends what the other expects, and owners are those that hold elements."""
    shapes = [(3, 5), (2, 40), (1, 1), (6, 6), (4, 4), (30, 3)]
    matrices, start = [], 0
    for rows, cols in shapes:
        matrices.append(Matrix(start=start, rows=rows, cols=cols))
        start = matrices[-1].end
    for size in (1, 2, 3, 5, 9):
        length = -(-start // size) + 1  # padded at the end
        homes = [Partition(matrices, length=length, rank=r, size=size) for r in range(size)]
        for matrix in matrices:
            held = [r for r, home in enumerate(homes) if matrix in home.own]
            assert held == list(homes[0].owners(matrix))
            assert sum(homes[0].count(matrix, r) for r in held) == matrix.numel
        for one in homes:
            for two in homes:
                assert one.elements_to_others()[two.rank] == two.elements_from_others()[one.rank]
        assert all(home.cut == homes[0].cut for home in homes)  # all join the exchange, or none
        assert bool(homes[0].cut) == (size > 1)


def test_shares_cover_everything_once_and_evenly():
    matrices = [[Matrix(start=0, rows=r, cols=8)] for r in (8, 8, 7, 6, 5, 4, 4, 3, 2, 1)]
    shares = Shared(matrices, 0, 3, steps=5).shares
    assert sorted(n for share in shares for n in share) == list(range(10))
    sizes = [sum(matrices[n][0].numel for n in share) for share in shares]
    assert max(sizes) <= 1.4 * min(sizes)


def test_describe_and_memory():
    config = compose("train", ["optimizer=muon"])
    plans = [make_plan(compose("train", [f"optimizer={o}"])) for o in ("adamw", "muon")]
    model = build.build_model(config, vocab_size=256, device="meta")
    spec = build.part(config["optimizer"], "optimizer=muon")
    text = spec.describe(model)
    head, names, *_ = text.splitlines()
    cuts = matrix_parameters(model)
    assert f"Muon on {sum(map(len, cuts.values()))} matrices" in head
    assert "q_proj.weight" in names
    assert "gate_up.weight" in names
    inside = sum(m.numel for cut in cuts.values() for m in cut)
    assert f"{inside:,} parameters" in head
    adamw, muon = (plan.memory[0].optimizer for plan in plans)
    assert adamw - muon == 4 * inside


def test_groups_hold_every_parameter_once():
    module, spec = tiny_muon.build()
    groups = spec.groups(module)
    names = [name for members in groups.values() for name in members]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert "model.layers.0.gate" in groups["no_decay"]
    assert {"model.head.weight", "model.layers.1.router.weight"} == set(groups["decay"])
    lrs = {group["name"]: group["lr"] for group in spec.build(module).param_groups}
    assert lrs == {"matrices": 2e-2, "decay": 1e-2, "no_decay": 1e-2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": -1.0}, r"lr: got -1.0, expected at least 0; fix optimizer.lr"),
        ({"momentum": 1.0}, r"momentum: got 1.0, expected at least 0 and below 1"),
        (
            {"lr_scaling": "rms"},
            r"lr_scaling: got 'rms', expected one of original, match_rms_adamw",
        ),
        ({"ns_dtype": "fp8"}, r"ns_dtype: got 'fp8', expected one of auto, fp16, bf16, fp32"),
        ({"ns_steps": 0}, r"ns_steps: got 0, expected at least 1"),
        ({"momentum": 0.0}, r"nesterov: has no effect with momentum=0; set optimizer.nesterov"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        tiny_muon.build(**changed)


def test_a_model_without_matrices_and_zero3_are_refused(configure):
    _, spec = tiny_muon.build()
    with pytest.raises(ValueError, match=r"muon: has no effect, .* set optimizer=adamw"):
        spec.groups(nn.LayerNorm(3))
    config = configure("zero3", "optimizer=muon", "deepspeed=zero3")
    with pytest.raises(
        ValueError, match=r"optimizer=muon: got deepspeed=zero3.* set deepspeed=zer"
    ):
        Setup.check(config, World(rank=0, size=1, local_rank=0), torch.device("cpu"))


def test_deepspeeds_own_muon_stays_out():
    """It takes over where the name of the optimizer's class says so and parameters are tagged."""
    module, spec = tiny_muon.build()
    assert "muon" not in type(spec.build(module)).__name__.lower()
    assert not any(hasattr(parameter, "use_muon") for parameter in module.parameters())


def test_a_training(configure, caplog, capsys):
    caplog.set_level(logging.INFO, logger="llmtrain")
    config = configure("run", "optimizer=muon", "optimizer.lr=3e-3", "train.log_every=1")
    summary = train(config)
    assert summary["finished"]
    assert "Muon on" in capsys.readouterr().out
    checked = [r.getMessage() for r in caplog.records if "optimizer check" in r.getMessage()]
    assert [line.split(": ")[1] for line in checked] == ["matrices", "no_decay"]
    lines = map(json.loads, (Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    caplog.clear()
    reader = FragmentReader(summary["checkpoint"])
    assert {kind for kind, _ in reader.index} >= {"param", "momentum", "exp_avg", "exp_avg_sq"}
    more = ("optimizer=muon", "optimizer.lr=3e-3", "train.total_tokens=3328")
    assert train(configure("run", *more, "health.optimizer_check=false"))["step"] == 13
    assert not [r for r in caplog.records if "optimizer check" in r.getMessage()]


def test_elements_of_a_check_that_is_off(configure):
    with pytest.raises(ValueError, match=r"elements=9: has no effect with health.opt"):
        configure("x", "health.optimizer_check=false", "health.optimizer_check_elements=9")


@pytest.mark.gpu
def test_steps_on_a_gpu_equal_torch():
    """In float16, with the clipping factor and the skip flag on the device."""
    module, spec = tiny_muon.build(ns_dtype="auto")
    other, _ = tiny_muon.build()
    module, other = module.cuda(), other.cuda()
    optimizer = spec.build(module)
    step_both, _ = pair(other, spec)
    for step in range(4):
        skipped = step == 2
        for model, factor in ((module, 8.0), (other, 1.0)):
            gradients(model.cpu(), step)
            for parameter in model.parameters():
                parameter.grad.mul_(math.nan if skipped and factor > 1 else factor)
            model.cuda()
        optimizer.grad_scale = torch.tensor(8.0, device="cuda")
        optimizer.found_inf = torch.tensor(float(skipped), device="cuda")
        optimizer.step()
        if not skipped:
            step_both(1.0)
    close(dict(module.named_parameters()), dict(other.named_parameters()), 2e-3)
