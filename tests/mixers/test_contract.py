"""Every mixer of configs/mixer keeps the contract of llmtrain/mixers/base.py.

A new YAML file is tested from the day it exists. `subject` builds its mixer; a clause is one test.
At the end broken mixers prove that the clauses catch what they are for.
"""

import inspect
from dataclasses import replace
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
from llmtrain.model.position import Rope

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("mixer/*.yaml"))
D, B, T, LAYERS = 16, 2, 24, 4
SIZES = {"d_model": D, "n_heads": 4, "n_kv_heads": 2, "head_dim": None, "init_std": 0.3}
# Knobs that bring a mixer's edges (a window, a chunk) inside rows of T tokens.
SMALL = {
    "sliding_window": {"window": 5},
    "mamba2": {"head_dim": 8, "d_state": 8, "n_groups": 2, "chunk": 8},
    "mamba": {"chunk": 8},
    "gated_deltanet": {"chunk": 8},
    "deltanet": {"chunk": 8},
    "mlstm": {"chunk": 8, "input_gate_bias": -1.0, "gate_init_std": 0.3},
    "slstm": {"recurrent_init_std": 0.3},
}
# Further knobs worth the whole suite: name -> (YAML, knobs).
VARIANTS = {
    "qk_bias": ("mha", {"qk_bias": True}),
    "qk_norm_and_bias": ("attention", {"qk_norm": True, "bias": True}),
    "mla_ranks": (
        "mla",
        {"q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "v_head_dim": 7},
    ),
    "gate_sinks_softcap": (
        "sliding_window",
        {"window": 5, "sinks": 3, "softcap": 1.5, "output_gate": True},
    ),
    "zero_centred_qk_norm": ("mqa", {"qk_norm": True, "qk_norm_zero_centered": True}),
    "mamba2_norm_before_gate": (
        "mamba2",
        {"head_dim": 8, "d_state": 8, "d_conv": 1, "norm_before_gate": True, "bias": True},
    ),
    "mamba_heads_inner_norm": (
        "mamba",
        {"chunk": 5, "d_state": 3, "n_heads": 4, "inner_norm": True, "bias": True},
    ),
    "gated_deltanet_groups_negative": (
        "gated_deltanet",
        {
            "chunk": 4,
            "n_heads": 2,
            "n_v_heads": 4,
            "head_dim": 4,
            "expand_k": None,
            "expand_v": 1.5,
            "allow_neg_eigval": True,
            "conv_bias": True,
        },
    ),
    "mlstm_sigmoid_conv": (
        "mlstm",
        {"chunk": 8, "input_gate": "sigmoid", "d_conv": 4, "gate_init_std": 0.3, "bias": True},
    ),
    "slstm_exponential_dense": (
        "slstm",
        {
            "n_heads": 2,
            "d_conv": None,
            "forget_gate": "exp",
            "block_diagonal": False,
            "recurrent_init_std": 0.3,
            "out_proj": True,
            "head_norm": "rmsnorm",
        },
    ),
}
FACTS = {"layer_idx": 1, "n_layers": LAYERS}
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64, sums in another order


class Subject:
    """One mixer under test: its YAML node and how to build it."""

    def __init__(self, name, toys):
        self.name = name
        if name in toys:
            self.cls, self.node = toys[name], {"init_std": 0.2}
            return
        yaml, changes = VARIANTS.get(name, (name, SMALL.get(name, {})))
        sizes = OmegaConf.merge(OmegaConf.load(CONFIGS / "model" / "tiny.yaml"), SIZES)
        config = OmegaConf.create({"model": sizes})
        config.mixer = OmegaConf.load(CONFIGS / "mixer" / f"{yaml}.yaml")
        self.node = {**OmegaConf.to_container(config, resolve=True)["mixer"], **changes}
        self.cls = target(self.node, f"mixer={name}")

    def empty(self, **changes):
        """The mixer as its constructor leaves it."""
        node = {**self.node, **changes}
        if "_target_" not in node:
            return self.cls(D, **FACTS, **node)
        return part(node, f"mixer={self.name}", D, **FACTS)

    def mixer(self, dtype=torch.float64, **changes):
        mixer = self.empty(**changes)
        initialise(mixer, 0)
        return mixer.to(dtype)


@pytest.fixture(params=[*NAMES, *VARIANTS, "Recurrence"])
def subject(request, toy_mixers):
    return Subject(request.param, toy_mixers)


def rotated(mixer, ctx):
    """The context as the model would hand it to this mixer."""
    if not mixer.uses_positions:
        return ctx
    rope = Rope(D, max_seq_len=T, rotary_widths=(mixer.rotary_width,))
    return ctx.with_rotary(rope.rotary(ctx))


def dense(mixer, batch, tokens, prefix_tokens=0):
    return rotated(mixer, SequenceContext.dense(batch, tokens, prefix_tokens=prefix_tokens))


def packed(mixer, *starts):
    """A row of T tokens for each argument, which lists where its documents start."""
    starts_BT = torch.zeros(len(starts), T, dtype=torch.bool)
    for row, indices in enumerate(starts):
        starts_BT[row, list(indices)] = True
    return rotated(mixer, SequenceContext.packed(starts_BT))


def steps(mixer, x_BTD, positions_B, state):
    """Outputs and state after x_BTD, one token at a time; row b starts at positions_B[b]."""
    outputs = []
    for t in range(x_BTD.shape[1]):
        ctx = SequenceContext(positions_BT=(positions_B + t)[:, None], max_seqlen=1)
        y_BD, state = mixer.step(x_BTD[:, t], rotated(mixer, ctx), state)
        outputs.append(y_BD)
    return torch.stack(outputs, dim=1), state


def fresh(mixer, batch, max_tokens=T, dtype=torch.float64):
    return mixer.init_state(batch, max_tokens=max_tokens, device="cpu", dtype=dtype)


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(mixer, y_BTD, weights_BTD, x_BTD):
    """d sum(weights * y) for x and every parameter."""
    leaves = [x_BTD, *mixer.parameters()]
    return torch.autograd.grad((y_BTD * weights_BTD).sum(), leaves)


def test_yaml_keys_are_the_signature(subject):
    parameters = inspect.signature(subject.cls).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert list(parameters)[:3] == ["d_model", "layer_idx", "n_layers"]
    assert set(knobs(subject.node)) == set(parameters) - {"d_model", *FACTS}


def test_builds_on_meta(subject):
    with torch.device("meta"):
        mixer = subject.empty()
    initialise(mixer, 0)
    sizes = {name: parameter.shape for name, parameter in mixer.named_parameters()}
    assert sizes == {n: p.shape for n, p in subject.empty().named_parameters()}
    assert all(parameter.is_meta for parameter in mixer.parameters())
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.float32}
    assert set(mixer.no_weight_decay) <= set(sizes)


def test_every_parameter_is_filled(subject):
    with torch.device("meta"):
        mixer = subject.empty()
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialise(mixer, 0)
    for name, parameter in mixer.named_parameters():
        assert parameter.isfinite().all(), name


def test_init_depends_on_nothing_else(subject):
    alone = nn.ModuleDict({"mixer": subject.empty()})
    crowd = nn.ModuleDict({"first": Linear(3, 3), "mixer": subject.empty(), "last": Linear(5, 5)})
    torch.manual_seed(1)
    initialise(alone, 7)
    torch.manual_seed(2)
    initialise(crowd, 7)
    for name, parameter in alone["mixer"].state_dict().items():
        assert parameter.equal(crowd["mixer"].state_dict()[name]), name


def test_state_dict_round_trip(subject):
    mixer, other = subject.mixer(), subject.empty().double()
    other.load_state_dict(mixer.state_dict(), strict=True)
    x_BTD = noise(B, T, D)
    ctx = dense(mixer, B, T)
    assert mixer(x_BTD, ctx)[0].equal(other(x_BTD, ctx)[0])


@pytest.mark.parametrize("tokens", [1, T])
def test_shape_and_dtype(subject, tokens):
    mixer = subject.mixer(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x_BTD = noise(B, tokens, D, dtype=dtype)
        y_BTD, state = mixer(x_BTD, dense(mixer, B, tokens))
        assert (y_BTD.shape, y_BTD.dtype, state) == (x_BTD.shape, dtype, None)


def test_input_layout_does_not_matter(subject):
    mixer, x_TBD = subject.mixer(), noise(T, B, D)
    ctx, x_BTD = dense(mixer, B, T), x_TBD.transpose(0, 1)
    before = x_BTD.clone()
    y_BTD, _ = mixer(x_BTD, ctx)
    assert x_BTD.equal(before)
    torch.testing.assert_close(y_BTD, mixer(x_BTD.contiguous(), ctx)[0], **EXACT)


def test_every_parameter_gets_a_finite_gradient(subject):
    mixer, x_BTD = subject.mixer(torch.float32), noise(B, T, D, dtype=torch.float32)
    mixer(x_BTD, packed(mixer, [9], [3, 4]))[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_positions_are_used_as_declared(subject):
    mixer, x_BTD = subject.mixer(), noise(B, T, D)
    ctx = SequenceContext.dense(B, T)
    width = mixer.rotary_width if mixer.uses_positions else 4
    turned = ctx.with_rotary(Rope(D, max_seq_len=T, rotary_widths=(width,)).rotary(ctx))
    same = mixer(x_BTD, ctx)[0].equal(mixer(x_BTD, turned)[0])
    assert same is not mixer.uses_positions


@pytest.mark.parametrize("changed", [1, 7, T - 1])
def test_information_flow(subject, changed):
    """Causal: a token changes nothing before it, to the last bit. Else: it reaches everywhere."""
    mixer, x_BTD = subject.mixer(torch.float32), noise(B, T, D, dtype=torch.float32)
    ctx = dense(mixer, B, T)
    other_BTD = x_BTD.clone()
    other_BTD[:, changed] += 1.0
    same_BT = (mixer(x_BTD, ctx)[0] == mixer(other_BTD, ctx)[0]).all(dim=-1)
    assert not same_BT[:, changed].any()
    if mixer.causal:
        assert same_BT[:, :changed].all()
    else:
        assert not same_BT.any()


def test_packed_documents_are_separate(subject):
    mixer, weights_BTD = subject.mixer(), noise(B, T, D, seed=1)
    starts = [[0, 1, 9, 17, 23], [0, 12]]
    x_BTD = noise(B, T, D).requires_grad_()
    y_BTD, _ = mixer(x_BTD, packed(mixer, *starts))
    got = gradients(mixer, y_BTD, weights_BTD, x_BTD)
    rows = []
    for row, indices in enumerate(starts):
        spans = zip(indices, [*indices[1:], T])
        parts = [mixer(x_BTD[row : row + 1, a:b], dense(mixer, 1, b - a))[0] for a, b in spans]
        rows.append(torch.cat(parts, dim=1))
    expected_BTD = torch.cat(rows)
    torch.testing.assert_close(y_BTD, expected_BTD, **EXACT)
    expected = gradients(mixer, expected_BTD, weights_BTD, x_BTD)
    torch.testing.assert_close(got, expected, **EXACT)


@torch.no_grad()
def test_state_layout(subject):
    """Batch first; shapes and dtypes that no call changes; as many bytes as announced."""
    mixer, x_BTD = subject.mixer(), noise(B, T, D)

    def layout(state):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    first = layout(fresh(mixer, B))
    assert all(shape[0] == B for shape, _ in first.values())
    _, state = mixer(x_BTD[:, :9], dense(mixer, B, 9), fresh(mixer, B))
    assert layout(state) == first
    _, state = steps(mixer, x_BTD[:, 9:10], torch.full((B,), 9), state)
    assert layout(state) == first
    for tokens in (1, 4, T, 100):
        for dtype in (torch.float32, torch.bfloat16):
            row = fresh(mixer, 1, max_tokens=tokens, dtype=dtype)
            size = sum(tensor.numel() * tensor.itemsize for tensor in row.values())
            assert mixer.state_bytes(tokens, dtype) == size


@torch.no_grad()
def test_step_is_forward(subject):
    mixer, x_BTD = subject.mixer(), noise(B, T, D)
    expected_BTD, _ = mixer(x_BTD, dense(mixer, B, T))
    y_BTD, _ = steps(mixer, x_BTD, torch.zeros(B, dtype=torch.int64), fresh(mixer, B))
    torch.testing.assert_close(y_BTD, expected_BTD, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1], [9], [T - 1], [4, 5, 16]])
def test_prefix_state_splits(subject, cuts):
    """Chunks of any length, then single tokens: all as the whole row at once."""
    mixer, x_BTD = subject.mixer(), noise(B, T + 2, D)
    expected_BTD, _ = mixer(x_BTD, dense(mixer, B, T + 2))
    state, outputs = fresh(mixer, B, max_tokens=T + 2), []
    for a, b in zip([0, *cuts], [*cuts, T]):
        y_BTD, state = mixer(x_BTD[:, a:b], dense(mixer, B, b - a, prefix_tokens=a), state)
        outputs.append(y_BTD)
    y_BTD, _ = steps(mixer, x_BTD[:, T:], torch.full((B,), T), state)
    torch.testing.assert_close(torch.cat([*outputs, y_BTD], dim=1), expected_BTD, **EXACT)


@torch.no_grad()
def test_state_rows_are_independent(subject):
    """Rows of different ages, concatenated, reordered and repeated, go on as they would alone."""
    mixer, x_BTD = subject.mixer(), noise(2, T, D)
    expected_BTD, _ = mixer(x_BTD, dense(mixer, 2, T))
    ages, states = [3, 11], []
    for row, age in enumerate(ages):
        ctx = dense(mixer, 1, age)
        states.append(mixer(x_BTD[row : row + 1, :age], ctx, fresh(mixer, 1))[1])
    rows = torch.tensor([1, 0, 1])
    state = {name: torch.cat([s[name] for s in states]).index_select(0, rows) for name in states[0]}
    ages_B, count = torch.tensor(ages)[rows], 6
    more_BTD = torch.stack([x_BTD[r, ages[r] : ages[r] + count] for r in rows.tolist()])
    y_BTD, _ = steps(mixer, more_BTD, ages_B, state)
    for i, row in enumerate(rows.tolist()):
        span = slice(ages[row], ages[row] + count)
        torch.testing.assert_close(y_BTD[i], expected_BTD[row, span], **EXACT)


def test_bfloat16_is_near_float64(subject):
    exact, x_BTD = subject.mixer(), noise(B, T, D)
    low = subject.mixer(torch.float32)  # parameters stay float32, as in training
    ctx = packed(exact, [9], [3, 4])
    y_BTD = exact(x_BTD, ctx)[0]
    error_BTD = low(x_BTD.bfloat16(), ctx)[0].double() - y_BTD
    assert error_BTD.norm() / y_BTD.norm() < 0.02  # rounding each of few operations to 2^-9


@pytest.mark.gpu
def test_on_a_gpu(subject):
    """bfloat16 near float64 on the CPU, output and gradients; a prefix and steps as the whole."""
    exact, low = subject.mixer(), subject.mixer(torch.float32).cuda()
    x_BTD, weights_BTD = (noise(B, T, D, seed=i).bfloat16().double() for i in range(2))
    y_BTD = exact(x_BTD.requires_grad_(), packed(exact, [9], [3, 4]))[0]
    expected = [y_BTD, *gradients(exact, y_BTD, weights_BTD, x_BTD)]
    low_BTD = x_BTD.detach().bfloat16().cuda().requires_grad_()
    y_BTD = low(low_BTD, moved(packed(exact, [9], [3, 4])))[0]
    got = [y_BTD, *gradients(low, y_BTD, weights_BTD.bfloat16().cuda(), low_BTD)]
    largest = max(truth.norm() for truth in expected)  # small gradients are sums that cancel
    for near, truth in zip(got, expected, strict=True):
        assert (near.double().cpu() - truth).norm() < 0.05 * truth.norm() + 2e-3 * largest
    with torch.no_grad():
        x_BTD = noise(B, T, D, dtype=torch.float32).cuda()
        whole_BTD = low(x_BTD, moved(dense(exact, B, T)))[0]
        state = low.init_state(B, max_tokens=T, device="cuda", dtype=torch.float32)
        first_BTD, state = low(x_BTD[:, :9], moved(dense(exact, B, 9)), state)
        parts = [first_BTD]
        for t in range(9, T):
            ctx = SequenceContext(positions_BT=torch.full((B, 1), t), max_seqlen=1)
            y_BD, state = low.step(x_BTD[:, t], moved(rotated(exact, ctx)), state)
            parts.append(y_BD[:, None])
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTD, rtol=2e-3, atol=2e-3)


def moved(ctx):
    """The context on the GPU, rotary tables too."""
    tables = {
        width: replace(table, cos_BTR=table.cos_BTR.cuda(), sin_BTR=table.sin_BTR.cuda())
        for width, table in (ctx.rotary or {}).items()
    }
    return ctx.to("cuda").with_rotary(tables or None)


@pytest.mark.slow
def test_compiles_as_one_graph(subject):
    """Forward and gradients, documents of any number and length, without compiling for each."""
    torch._dynamo.reset()
    mixer, x_BTD = subject.mixer(), noise(B, T, D).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    contexts = [packed(mixer, range(0, T, every), [5]) for every in (1, 2, 3, 4, 6, 12)]
    for ctx in [*contexts, dense(mixer, B, T)]:
        y_BTD, expected_BTD = compiled(x_BTD, ctx)[0], mixer(x_BTD, ctx)[0]
        torch.testing.assert_close(y_BTD, expected_BTD, **EXACT)
        got, expected = (gradients(mixer, y, x_BTD.detach(), x_BTD) for y in (y_BTD, expected_BTD))
        torch.testing.assert_close(got, expected, **EXACT)
    assert counter.frame_count <= 4  # packed: static, then with free sizes; dense


@pytest.mark.parametrize("tokens", [1, 7, T])
def test_flops_are_those_counted(subject, tokens):
    """Matrix products of the reference backend, which multiplies nothing that its mask hides."""
    reference = {"backend": "reference"} if "backend" in subject.node else {}
    mixer, x_BTD = subject.mixer(**reference), noise(1, tokens, D)
    with FlopCounterMode(display=False) as counter:
        mixer(x_BTD, dense(mixer, 1, tokens))
    assert counter.get_total_flops() == pytest.approx(tokens * mixer.flops_per_token(tokens), 1e-12)


def test_overfits_a_tiny_batch(subject):
    """Each token must say what the one before it was."""
    mixer, x_BTD = subject.mixer(torch.float32), noise(B, T, D, dtype=torch.float32)
    ctx = dense(mixer, B, T)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (mixer(x_BTD, ctx)[0][:, 1:] - x_BTD[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


CATCHES = {
    "PeeksAhead": lambda s: test_information_flow(s, 7),
    "CrossesDocuments": test_packed_documents_are_separate,
    "StepsDifferently": test_step_is_forward,
    "ForgetsItsPrefix": lambda s: test_prefix_state_splits(s, [9]),
    "MixesRows": test_state_rows_are_independent,
    "CountsTooLittle": lambda s: test_flops_are_those_counted(s, 7),
    "SizesTooLittle": test_state_layout,
    "NeverFilled": test_every_parameter_is_filled,
    "RoundsHard": test_bfloat16_is_near_float64,
    "BreaksTheGraph": test_compiles_as_one_graph,
    "ClaimsPositions": test_positions_are_used_as_declared,
    "TakesAnything": test_yaml_keys_are_the_signature,
}


@pytest.mark.parametrize("defect", CATCHES)
def test_the_suite_catches(defect, toy_mixers):
    broken = Subject(defect, toy_mixers)
    with pytest.raises((AssertionError, Unsupported, UserError)):
        CATCHES[defect](broken)


def test_every_broken_mixer_is_tried(toy_mixers):
    assert set(CATCHES) == set(toy_mixers) - {"Recurrence"}
