"""The norms: definitions, torch's operators, groups and gates, what they keep, and messages."""

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels import norm
from llmtrain_kernels.norm import cost, op, plain, reference, select_backend
from torch.utils.flop_counter import FlopCounterMode

FUNCTIONS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
FUNCTIONS += ("gated_rms_norm", "gated_layer_norm")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
EPS = 1e-3


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(name, shape=(2, 5, 24), dtype=torch.float64):
    """Tensors of a function, which want gradients, and options that it needs."""
    made = [random(*shape, seed=0)]
    if not name.startswith(("rms", "layer")):
        made.append(2 * random(*shape, seed=1))  # a residual, or a gate
    made.append(1 + 0.3 * random(shape[-1], seed=2))
    if "layer" in name:
        made.append(random(shape[-1], seed=3))
    options = {"eps": EPS} | ({"norm_before_gate": True} if name.startswith("gated") else {})
    return [z.to(dtype).requires_grad_() for z in made], options


def with_gradients(name, tensors, **options):
    made = getattr(norm, name)(*tensors, **options)
    made = made if isinstance(made, tuple) else (made,)
    upstream = [random(*z.shape, seed=9 + i).to(z.dtype) for i, z in enumerate(made)]
    return [*made, *torch.autograd.grad(made, tensors, upstream)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backends_share_the_signature(name):
    parameters = inspect.signature(getattr(norm, name)).parameters
    expected = [p for key, p in parameters.items() if key != "backend"]
    for module in (reference, plain):
        assert list(inspect.signature(getattr(module, name)).parameters.values()) == expected


def test_reference_is_the_definition():
    """A row by its numbers, as the equations have it."""
    x, z, w, b = random(6, seed=0), random(6, seed=1), random(6, seed=2), random(6, seed=3)
    root = (sum(a * a for a in x) / 6 + EPS) ** 0.5
    torch.testing.assert_close(reference.rms_norm(x, w, eps=EPS), x / root * w, **EXACT)
    got = reference.rms_norm(x, w, eps=EPS, zero_centered=True)
    torch.testing.assert_close(got, x / root * (1 + w), **EXACT)
    mean = sum(x) / 6
    deviation = (sum((a - mean) ** 2 for a in x) / 6 + EPS) ** 0.5
    got = reference.layer_norm(x, w, b, eps=EPS)
    torch.testing.assert_close(got, (x - mean) / deviation * w + b, **EXACT)
    got = reference.gated_rms_norm(x, z, w, eps=EPS, norm_before_gate=True)
    torch.testing.assert_close(got, x / root * w * z / (1 + (-z).exp()), **EXACT)
    u = x * z / (1 + (-z).exp())
    got = reference.gated_rms_norm(x, z, w, eps=EPS, norm_before_gate=False)
    root = (sum(a * a for a in u) / 6 + EPS) ** 0.5
    torch.testing.assert_close(got, u / root * w, **EXACT)
    for y, h in (
        reference.add_rms_norm(x, z, w, eps=EPS),
        reference.add_layer_norm(x, z, w, b, eps=EPS),
    ):
        assert torch.equal(h, x + z)
        assert not torch.equal(y, h)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torchs_operators_agree_with_the_reference(name):
    tensors, options = arguments(name)
    variants = [{}]
    if not name.startswith("add"):
        variants.append({"group_width": 8})
    if "rms" in name and not name.startswith("gated"):
        variants += [{**variant, "zero_centered": True} for variant in variants]
    if name.startswith("gated"):
        variants += [{"norm_before_gate": False}, {"group_width": 8, "activation": "sigmoid"}]
        variants += [{"norm_before_gate": False, "group_width": 8}]
    for variant in variants:
        got, expected = (
            with_gradients(name, tensors, **{**options, **variant, "backend": backend})
            for backend in ("torch", "reference")
        )
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_is_differentiable(name):
    tensors, options = arguments(name, (2, 6))
    options["backend"] = "reference"
    assert torch.autograd.gradcheck(lambda *z: getattr(norm, name)(*z, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_they_are_torchs_own(dtype):
    """Bit for bit, with gains cast to x's dtype; h is the plain sum."""
    x, residual = random(3, 5, 24, seed=0, dtype=dtype), random(3, 5, 24, seed=1, dtype=dtype)
    w, b = random(24, seed=2).float(), random(24, seed=3).float()
    low_w, low_b = w.to(dtype), b.to(dtype)
    assert torch.equal(norm.rms_norm(x, w, eps=EPS), F.rms_norm(x, (24,), low_w, EPS))
    got = norm.rms_norm(x, w, eps=EPS, zero_centered=True)
    assert torch.equal(got, F.rms_norm(x, (24,), (1 + w).to(dtype), EPS))
    got = norm.layer_norm(x, w, b, eps=EPS)
    assert torch.equal(got, F.layer_norm(x, (24,), low_w, low_b, EPS))
    y, h = norm.add_rms_norm(x, residual, w, eps=EPS)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, F.rms_norm(h, (24,), low_w, EPS))
    y, h = norm.add_layer_norm(x, residual, w, eps=EPS)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, F.layer_norm(h, (24,), low_w, None, EPS))


@pytest.mark.parametrize("name", ["gated_rms_norm", "gated_layer_norm"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gates_of_any_size(name, backend):
    """Values and gradients are finite, and the gate's dtype is the result's."""
    gates = torch.tensor([-3e38, -1e5, -100.0, 0.0, 100.0, 1e5, 3e38, 1e4])
    for before in (True, False):
        tensors, options = arguments(name, (4, 8), torch.float32)
        options |= {"norm_before_gate": before, "backend": backend}
        tensors[1] = gates.repeat(4, 1).to(torch.bfloat16).requires_grad_()
        got = with_gradients(name, tensors, **options)
        assert got[0].dtype == torch.bfloat16
        assert all(z.isfinite().all() for z in got)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_as_one_graph(name):
    tensors, options = arguments(name, dtype=torch.float32)

    def step(*given):
        made = getattr(norm, name)(*given, **options)
        return made[0] if isinstance(made, tuple) else made

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), step(*tensors), rtol=0, atol=0)


KINDS = {
    "rms_norm": {},
    "add_rms_norm": {"residual": True},
    "layer_norm": {"bias": True, "centered": True},
    "add_layer_norm": {"residual": True, "bias": True, "centered": True},
    "gated_rms_norm": {"gate": True},
    "gated_layer_norm": {"gate": True, "bias": True, "centered": True},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_cost_is_what_goes_in_and_out(name):
    """Beside tensors: 4 bytes a row, 8 of a layer norm. h's gradient is as large as y's."""
    tensors, options = arguments(name, (10, 24), torch.float32)
    with FlopCounterMode(display=False) as counter:
        made = with_gradients(name, tensors, **options)
    assert counter.get_total_flops() == 0
    outputs = made[: len(made) - len(tensors)]
    gradients = made[len(outputs) :]
    forward, backward = cost(10, 24, dtype=torch.float32, **KINDS[name])
    statistics = 10 * (8 if "layer" in name else 4)
    assert forward.flops == backward.flops == 0
    assert forward.bytes_read == sum(z.nbytes for z in tensors)
    assert forward.bytes_written == sum(z.nbytes for z in outputs) + statistics
    rows, vectors = tensors[0].nbytes, sum(z.nbytes for z in tensors if z.dim() == 1)
    kept = rows * (2 if name.startswith("gated") else 1)
    assert forward.saved_bytes == kept + statistics
    upstream = sum(z.nbytes for z in outputs)
    assert backward.bytes_read == upstream + kept + statistics + vectors
    once = rows if name.startswith("add") else 0  # x and residual have one gradient
    assert backward.bytes_written == sum(z.nbytes for z in gradients) - once
    grouped, _ = cost(10, 24, dtype=torch.float32, group_width=8, **KINDS[name])
    assert grouped.saved_bytes == kept + 3 * statistics


BF16 = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("cuda", BF16, 4096), None),
        (("cuda", (torch.float64,), 64), "they take float32, bfloat16 and float16, not float64"),
        (("cuda", BF16, 16385), "they take rows up to 16384 wide, not 16385"),
        (("cpu", BF16, 64), "they run on cuda, not cpu"),
    ],
)
def test_where_the_kernels_can_run(monkeypatch, case, reason):
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert op.unsupported(*case) == reason
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", False)
    with pytest.raises(
        ValueError, match=r"rms_norm: got backend='triton'.*triton is not installed"
    ):
        select_backend("rms_norm", "triton", *case)


def test_auto_takes_the_kernels_on_a_gpu_alone_and_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    op.triton_backend.automatic.cache_clear()
    for _ in range(2):
        assert select_backend("rms_norm", "auto", "cuda", BF16, 64) == "triton"
        assert select_backend("rms_norm", "auto", "cuda", BF16, 2**15) == "torch"
        assert select_backend("layer_norm", "auto", "cpu", BF16, 64) == "torch"
    found = [(record.levelname, record.message) for record in caplog.records]
    assert found == [
        ("INFO", "rms_norm: triton on cuda (fused)"),
        ("WARNING", "rms_norm: torch on cuda (they take rows up to 16384 wide, not 32768)"),
        ("INFO", "layer_norm: torch on cpu (they run on cuda, not cpu)"),
    ]
    op.triton_backend.automatic.cache_clear()


X, W = torch.zeros(2, 6), torch.zeros(6)


@pytest.mark.parametrize(
    ("name", "given", "options", "message"),
    [
        ("rms_norm", (X, W), {"backend": "fast"}, "rms_norm: got backend='fast', expected auto or"),
        ("rms_norm", (X, W[:5]), {}, r"rms_norm: got a weight or bias \(5,\) for rows of 6"),
        ("rms_norm", (X, W), {"group_width": 4}, "got group_width=4 for rows of 6, expected a div"),
        ("layer_norm", (X, W, W[:1]), {}, r"layer_norm: got a weight or bias \(1,\)"),
        ("add_rms_norm", (X, X[:1], W), {}, r"add_rms_norm: got \(2, 6\) and \(1, 6\), expected"),
        (
            "add_rms_norm",
            (X, X.half(), W),
            {},
            "got x of torch.float32 and residual of torch.float",
        ),
        (
            "gated_rms_norm",
            (X, X, W),
            {"norm_before_gate": True, "activation": "relu"},
            "gated_rms_norm: got activation='relu', expected one of silu, sigmoid",
        ),
    ],
)
def test_messages(name, given, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(norm, name)(*given, eps=EPS, **options)
