"""Every channel of configs/channel keeps the contract of llmtrain/channels/base.py.

A new YAML file is tested from the day it exists. `subject` builds its channel; a clause is one
test. At the end broken channels prove that the clauses catch what they are for.
"""

import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.exc import Unsupported, UserError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.build import knobs, part, target
from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise
from llmtrain.model.linear import Linear

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("channel/*.yaml"))
D, B, T, LAYERS = 16, 2, 24, 4
SIZES = {"d_model": D, "ffn_hidden": 24, "init_std": 0.3}
# Further knobs worth the whole suite: name -> (YAML, knobs).
VARIANTS = {
    "moe_of_deepseek": (
        "moe",
        {
            "score": "sigmoid",
            "scaling_factor": 2.5,
            "n_groups": 4,
            "top_groups": 2,
            "n_shared": 1,
            "bias_update_speed": 0.01,
            "balance": "sequence",
        },
    ),
    "moe_of_qwen": ("moe", {"top_k": 3, "n_shared": 2, "shared_hidden": 8, "shared_gate": True}),
    "moe_softmax_after": ("moe", {"score": "softmax_after", "n_experts": 5}),
    "moe_switch": ("moe", {"top_k": 1, "renormalise": False}),
}
FACTS = {"layer_idx": 1, "n_layers": LAYERS}
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64, sums in another order


class Subject:
    """One channel under test: its YAML node and how to build it."""

    def __init__(self, name, toys):
        self.name = name
        if name in toys:
            self.cls, self.node = toys[name], {"init_std": 0.3}
            return
        yaml, changes = VARIANTS.get(name, (name, {}))
        sizes = OmegaConf.merge(OmegaConf.load(CONFIGS / "model" / "tiny.yaml"), SIZES)
        config = OmegaConf.create({"model": sizes})
        config.channel = OmegaConf.load(CONFIGS / "channel" / f"{yaml}.yaml")
        self.node = {**OmegaConf.to_container(config, resolve=True)["channel"], **changes}
        self.cls = target(self.node, f"channel={name}")

    def empty(self, **changes):
        """The channel as its constructor leaves it."""
        node = {**self.node, **changes}
        if "_target_" not in node:
            return self.cls(D, **FACTS, **node)
        return part(node, f"channel={self.name}", D, **FACTS)

    def channel(self, dtype=torch.float64, **changes):
        channel = self.empty(**changes)
        if any(True for _ in channel.parameters()):
            initialise(channel, 0)
        return channel.to(dtype)


@pytest.fixture(params=[*NAMES, *VARIANTS, "Plain"])
def subject(request, toy_channels):
    return Subject(request.param, toy_channels)


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(batch=B, tokens=T):
    return SequenceContext.dense(batch, tokens)


def total(channel, x_BTD, weights_BTD, ctx):
    """A scalar of everything that is differentiated: the output on its residual, and losses."""
    y_BTD, aux = channel(x_BTD, ctx)
    return ((x_BTD + y_BTD) * weights_BTD).sum() + sum(
        v for k, v in aux.items() if k.startswith("loss/")
    )


def test_yaml_keys_are_the_signature(subject):
    parameters = inspect.signature(subject.cls).parameters
    kinds = {parameter.kind for name, parameter in parameters.items() if name != "d_model"}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    assert set(knobs(subject.node)) == set(parameters) - {"d_model", *FACTS}


def test_builds_on_meta(subject):
    with torch.device("meta"):
        channel = subject.empty()
    sizes = {name: value.shape for name, value in channel.state_dict().items()}
    assert sizes == {name: value.shape for name, value in subject.empty().state_dict().items()}
    assert all(value.is_meta for value in channel.state_dict().values())
    assert {parameter.dtype for parameter in channel.parameters()} <= {torch.float32}
    assert set(channel.no_weight_decay) <= set(sizes)
    assert channel.flops_per_token() >= 0
    assert 0 <= channel.idle_parameters() <= sum(p.numel() for p in channel.parameters())


def test_every_parameter_is_filled(subject):
    """Persistent buffers too."""
    with torch.device("meta"):
        channel = subject.empty()
    channel.to_empty(device="cpu")
    for value in channel.state_dict().values():
        value.fill_(float("nan"))
    initialise(nn.ModuleDict({"channel": channel, "other": Linear(3, 3)}), 0)
    for name, value in channel.state_dict().items():
        assert value.isfinite().all(), name


def test_init_depends_on_nothing_else(subject):
    alone = nn.ModuleDict({"channel": subject.empty(), "one": Linear(3, 3)})
    crowd = nn.ModuleDict({"first": Linear(3, 3), "channel": subject.empty(), "z": Linear(5, 5)})
    torch.manual_seed(1)
    initialise(alone, 7)
    torch.manual_seed(2)
    initialise(crowd, 7)
    for name, value in alone["channel"].state_dict().items():
        assert value.equal(crowd["channel"].state_dict()[name]), name


def test_state_dict_round_trip(subject):
    channel, other = subject.channel(), subject.empty().double()
    other.load_state_dict(channel.state_dict(), strict=True)
    x_BTD = noise(B, T, D)
    assert channel(x_BTD, dense())[0].equal(other(x_BTD, dense())[0])


@pytest.mark.parametrize("tokens", [1, T])
def test_shape_and_dtype(subject, tokens):
    channel = subject.channel(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x_BTD = noise(B, tokens, D, dtype=dtype)
        y_BTD, _ = channel(x_BTD, dense(B, tokens))
        assert (y_BTD.shape, y_BTD.dtype) == (x_BTD.shape, dtype)


def test_what_it_hands_up(subject):
    channel = subject.channel(torch.float32)
    _, aux = channel(noise(B, T, D, dtype=torch.bfloat16), dense())
    for key, value in aux.items():
        kind, name = key.split("/")
        assert kind in ("loss", "metric", "sum"), key
        assert name, key
        assert value.dtype == torch.float32, key
        assert value.isfinite().all(), key
        assert kind == "sum" or value.ndim == 0, key
        assert value.requires_grad is (kind == "loss"), key
    _, again = channel(noise(B, T, D, seed=3, dtype=torch.bfloat16), dense())
    layout = {key: value.shape for key, value in aux.items()}
    assert {key: value.shape for key, value in again.items()} == layout


def test_a_skipped_step_changes_nothing(subject):
    channel = subject.channel(torch.float32)
    _, aux = channel(noise(B, T, D, dtype=torch.float32), dense())
    sums = {key.removeprefix("sum/"): v for key, v in aux.items() if key.startswith("sum/")}
    before = {name: value.clone() for name, value in channel.state_dict().items()}
    skipped = channel.after_step({name: torch.zeros_like(v) for name, v in sums.items()})
    for name, value in channel.state_dict().items():
        assert value.equal(before[name]), name
    applied = channel.after_step(sums)
    assert skipped.keys() == applied.keys()
    assert all(key.startswith("metric/") for key in applied)
    assert all(value.ndim == 0 and value.isfinite() for value in applied.values())


def test_input_layout_does_not_matter(subject):
    channel, x_TBD = subject.channel(), noise(T, B, D)
    x_BTD = x_TBD.transpose(0, 1)
    before = x_BTD.clone()
    y_BTD, _ = channel(x_BTD, dense())
    assert x_BTD.equal(before)
    torch.testing.assert_close(y_BTD, channel(x_BTD.contiguous(), dense())[0], **EXACT)


@pytest.mark.parametrize("tokens", [1, T])
def test_every_parameter_gets_a_finite_gradient(subject, tokens):
    """Also when a part of it had nothing to do, as with one token for many experts."""
    channel, x_BTD = subject.channel(torch.float32), noise(B, tokens, D, dtype=torch.float32)
    total(channel, x_BTD.requires_grad_(), x_BTD.detach(), dense(B, tokens)).backward()
    for name, parameter in channel.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_tokens_are_independent(subject):
    """A token's output hangs on that token alone, wherever it stands and whatever is beside it."""
    channel, x_BTD = subject.channel(), noise(B, T, D)
    y_BTD, _ = channel(x_BTD, dense())
    order = torch.randperm(B * T, generator=torch.Generator().manual_seed(1))
    moved_BTD = x_BTD.flatten(0, 1)[order].view(B, T, D)
    torch.testing.assert_close(
        channel(moved_BTD, dense())[0].flatten(0, 1), y_BTD.flatten(0, 1)[order], **EXACT
    )
    for t in (0, 7):
        torch.testing.assert_close(
            channel(x_BTD[:, t : t + 1], dense(B, 1))[0], y_BTD[:, t : t + 1], **EXACT
        )
    starts_BT = torch.zeros(B, T, dtype=torch.bool)
    starts_BT[:, ::5] = True
    assert channel(x_BTD, SequenceContext.packed(starts_BT))[0].equal(y_BTD)


def test_bfloat16_is_near_float64(subject):
    exact, x_BTD = subject.channel(), noise(B, T, D, dtype=torch.bfloat16)
    low = subject.channel(torch.float32)  # parameters stay float32, as in training
    y_BTD = exact(x_BTD.double(), dense())[0]
    error_BTD = low(x_BTD, dense())[0].double() - y_BTD
    assert error_BTD.norm() <= 0.02 * y_BTD.norm()  # rounding each of few operations to 2^-9


@pytest.mark.gpu
def test_on_a_gpu(subject):
    """bfloat16 near float64 on the CPU: outputs of nearly all tokens, since a router's near tie may
    choose another expert, and the gradient of their sum."""
    exact, low = subject.channel(), subject.channel(torch.float32).cuda()
    x_BTD = noise(B, T, D).bfloat16().double()
    ctx = SequenceContext.dense(B, T)
    expected_BTD = exact(x_BTD, ctx)[0]
    low_BTD = x_BTD.bfloat16().cuda().requires_grad_()
    y_BTD = low(low_BTD, ctx.to("cuda"))[0]
    if y_BTD.requires_grad:  # channel=none adds nothing
        y_BTD.sum().backward()
    error_BT = (y_BTD.double().cpu() - expected_BTD).norm(dim=-1)
    near_BT = error_BT < 0.05 * expected_BTD.norm(dim=-1) + 1e-3
    assert near_BT.double().mean() > 0.9
    for name, parameter in low.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_compiles_as_one_graph(subject):
    """Forward and gradients; batches of one shape share the graph, however tokens are routed."""
    torch._dynamo.reset()
    channel = subject.channel()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(channel, fullgraph=True, backend=counter, dynamic=False)
    for seed in range(3):
        x_BTD = noise(B, T, D, seed=seed).requires_grad_()
        leaves, weights_BTD = [x_BTD, *channel.parameters()], noise(B, T, D, seed=9)
        got, expected = (total(f, x_BTD, weights_BTD, dense()) for f in (compiled, channel))
        torch.testing.assert_close(got, expected, **EXACT)
        got, expected = (torch.autograd.grad(scalar, leaves) for scalar in (got, expected))
        torch.testing.assert_close(got, expected, **EXACT)
    assert counter.frame_count <= 1  # none has nothing to compile


@pytest.mark.parametrize("backend", ["loop", "auto"])
@pytest.mark.parametrize("tokens", [1, 7, T])
def test_flops_are_those_counted(subject, tokens, backend):
    chosen = {"backend": backend} if "backend" in subject.node else {}
    channel, x_BTD = subject.channel(**chosen), noise(1, tokens, D)
    with FlopCounterMode(display=False) as counter:
        channel(x_BTD, dense(1, tokens))
    assert counter.get_total_flops() == tokens * channel.flops_per_token()


def test_overfits_a_tiny_batch(subject):
    if not list(subject.empty().parameters()):
        assert subject.empty()(noise(B, T, D), dense())[0].eq(0).all()
        return
    channel, x_BTD = subject.channel(torch.float32), noise(B, T, D, dtype=torch.float32)
    wanted_BTD = noise(B, T, D, seed=1, dtype=torch.float32)
    optimizer = torch.optim.Adam(channel.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = (channel(x_BTD, dense())[0] - wanted_BTD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


CATCHES = {
    "MixesTokens": test_tokens_are_independent,
    "ReadsPositions": test_tokens_are_independent,
    "NeverFilled": test_every_parameter_is_filled,
    "LeavesOneOut": lambda s: test_every_parameter_gets_a_finite_gradient(s, T),
    "CountsTooLittle": lambda s: test_flops_are_those_counted(s, 7, "auto"),
    "RoundsHard": test_bfloat16_is_near_float64,
    "BreaksTheGraph": test_compiles_as_one_graph,
    "TakesAnything": test_yaml_keys_are_the_signature,
    "SumsInBfloat16": test_what_it_hands_up,
    "MovesOnASkippedStep": test_a_skipped_step_changes_nothing,
}


@pytest.mark.parametrize("defect", CATCHES)
def test_the_suite_catches(defect, toy_channels):
    broken = Subject(defect, toy_channels)
    with pytest.raises((AssertionError, Unsupported, UserError)):
        CATCHES[defect](broken)


def test_every_broken_channel_is_tried(toy_channels):
    assert set(CATCHES) == set(toy_channels) - {"Plain"}
