"""The norms' Triton kernels: as Triton's interpreter runs them on a CPU (in a process of its own),
compiled for a GPU that need not be there, and on a GPU."""

from collections import defaultdict

import pytest
import torch
from llmtrain_kernels import norm
from llmtrain_kernels.launch import pinned, tables
from llmtrain_kernels.norm import fused
from offline import DEVICE, INTERPRETED, compile_for_hopper, hosts, run_in_interpreter, runs

pytest.importorskip("triton")

FORMS = ["rms", "zero", "add", "gate_first", "gate_last", "layer", "layer_bias", "add_layer"]
FORMS += ["sigmoid_layer_bias"]
WIDTHS = [(3, 7, 48), (2, 5, 128), (1, 1, 5), (9, 300)]  # shapes, the last the width
WIDTHS += [] if INTERPRETED else [(64, 4096), (33, 16384), (5, 7, 5632), (100, 40, 64), (0, 32)]
EPS = 1e-5


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def inputs(form, shape):
    """Tensors by name, in float64."""
    width = shape[-1]
    made = {"x": random(*shape, seed=0) * random(*shape[:-1], 1, seed=1).exp()}
    if form.startswith("add"):
        made["residual"] = random(*shape, seed=2)
    if "gate" in form or "sigmoid" in form:
        made["gate"] = 2 * random(*shape, seed=3)
    made["weight"] = 1 + 0.3 * random(width, seed=4)
    if "bias" in form or form == "add_layer":
        made["bias"] = random(width, seed=5)
    return made


def call(form, group_width, backend):
    """The function of a form, of the tensors by name."""
    options = {"eps": EPS, "backend": backend}
    if not form.startswith("add"):
        options["group_width"] = group_width
    if form == "zero":
        options["zero_centered"] = True
    if "gate" in form or "sigmoid" in form:
        options["norm_before_gate"] = form != "gate_first"
        options["activation"] = "sigmoid" if "sigmoid" in form else "silu"
    name = "layer_norm" if "layer" in form else "rms_norm"
    if form.startswith("add"):
        name = f"add_{name}"
    if "gate" in form or "sigmoid" in form:
        name = f"gated_{name}"
    return lambda **tensors: getattr(norm, name)(**tensors, **options)


def with_gradients(function, tensors, dtypes):
    """Outputs, and gradients of every tensor for random gradients of these. dtypes: by name; ""
    for the rest."""
    leaves = {n: keep_strides(z, dtypes.get(n, dtypes[""])) for n, z in tensors.items()}
    made = function(**leaves)
    made = made if isinstance(made, tuple) else (made,)
    upstream = [random(*z.shape, seed=9 + i).to(z.dtype) for i, z in enumerate(made)]
    return [*made, *torch.autograd.grad(made, list(leaves.values()), upstream)]


def keep_strides(z, dtype):
    return z.detach().to(dtype).requires_grad_()


def errors(got, expected):
    """Frobenius norms, relative to those of what is expected (1 where that is zero)."""
    pairs = zip(got, expected, strict=True)
    return [((a.double() - b).norm() / (b.norm() or 1.0)).item() for a, b in pairs]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernels are to write is not a number before."""
    empty = torch.empty

    def poison(*arguments, **options):
        made = empty(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(fused.torch, "empty", poison)


@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=60)


@runs
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_precise_as_the_reference_in_float32(form, shape):
    tensors = inputs(form, shape)
    exact, plain = (
        with_gradients(call(form, None, "reference"), tensors, {"": dtype})
        for dtype in (torch.float64, torch.float32)
    )
    got = with_gradients(call(form, None, "triton"), tensors, {"": torch.float32})
    assert [(z.shape, z.dtype) for z in got] == [(z.shape, z.dtype) for z in plain]
    for mine, reference in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine < 2 * reference + 3e-7


@runs
@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("add")])
def test_groups_with_gains_of_their_own(form):
    tensors = inputs(form, (2, 5, 3 * 16))
    exact = with_gradients(call(form, 16, "reference"), tensors, {"": torch.float64})
    got = with_gradients(call(form, 16, "triton"), tensors, {"": torch.float32})
    assert max(errors(got, exact)) < 1e-6
    whole = with_gradients(call(form, 48, "triton"), tensors, {"": torch.float32})
    exact = with_gradients(call(form, None, "reference"), tensors, {"": torch.float64})
    assert max(errors(whole, exact)) < 1e-6


LAYOUTS = {
    "part of a projection": lambda z: torch.cat([z, z], dim=-1)[..., : z.shape[-1]],
    "heads of a packed projection": lambda z: torch.cat([z, z], dim=2)[:, :, z.shape[2] :],
    "turned": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "last stride 2": lambda z: z.repeat_interleave(2, dim=-1)[..., ::2],
    "the same row": lambda z: z[:1, :1].expand(z.shape),
}


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["add", "gate_first", "layer_bias"])
def test_rows_are_read_where_they_lie(form, layout):
    """Inputs, and the gradient that comes in; each with strides of its own, too."""
    shape, place = (2, 3, 4, 24), LAYOUTS[layout]
    low = {name: z.float() for name, z in inputs(form, shape).items()}
    for which in ({"x"}, {"x", "residual", "gate", "dy"}):
        placed = {n: place(z) if n in which else z for n, z in low.items()}
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = {n: z.detach() for n, z in placed.items()}
            if dtype == torch.float64:
                leaves = {n: z.double() for n, z in leaves.items()}
            for z in leaves.values():
                z.requires_grad_()
            made = call(form, None, backend)(**leaves)
            made = made if isinstance(made, tuple) else (made,)
            upstream = [random(*shape, seed=9).to(dtype) for z in made]
            if "dy" in which:
                upstream[0] = place(upstream[0])
            results.append([*made, *torch.autograd.grad(made, list(leaves.values()), upstream)])
        assert max(errors(*results)) < 1e-6


@runs
def test_dense_rows_are_not_copied():
    """Two strides say where rows lie: nothing is copied for them."""
    packed = random(2, 3, 4 * 24, seed=0).float()
    heads = packed.unflatten(-1, (4, 24))[:, :, 1:3]
    (same,), rows, inner, strides = fused.rows_of((heads,))
    assert same is heads
    assert (rows, inner, strides) == (12, 2, [(96, 24)])
    (same,), rows, inner, strides = fused.rows_of((packed[..., :24],))
    assert (rows, inner, strides) == (6, 1, [(96, 0)])
    turned = random(2, 3, 4, 24, seed=0).transpose(0, 2)
    (copied,), rows, inner, strides = fused.rows_of((turned,))
    assert copied.is_contiguous()
    assert (rows, inner, strides) == (24, 1, [(24, 0)])


@runs
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_size(form):
    """Zeros, tiny and huge rows, and gates far out: finite, and the reference's in float32."""
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1e3, 1e15], device=DEVICE)
    tensors = {n: z.float() for n, z in inputs(form, (5, 40)).items()}
    tensors["x"] = tensors["x"] * sizes[:, None]
    if "gate" in tensors:
        gates = torch.tensor([-3e38, -1e5, -100.0, 0.0, 100.0, 1e5, 3e38, 1e4], device=DEVICE)
        tensors["gate"] = gates.repeat(5 * 40 // 8).view(5, 40)
        tensors["x"] = tensors["x"].clamp(-1e12, 1e12)
    got, expected = (
        with_gradients(call(form, None, backend), tensors, {"": torch.float32})
        for backend in ("triton", "reference")
    )
    assert all(z.isfinite().all() for z in got)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=2e-4, atol=1e-5 * truth.abs().max().item())


@runs
@pytest.mark.parametrize("form", ["rms", "add", "gate_last"])
def test_launches_of_other_shapes_agree(form):
    """Every number of rows, programs, stages and warps gives the same, partial tiles too."""
    tensors = inputs(form, (37, 40))
    exact = with_gradients(call(form, None, "reference"), tensors, {"": torch.float64})
    low = {n: z.float() for n, z in tensors.items()}
    x, residual, gate = (low.get(n) for n in ("x", "residual", "gate"))
    for rows, programs, stages in ((1, 1, 2), (4, 3, 1), (16, 0, 1), (64, 1, 3)):
        config = {"rows": rows, "programs": programs, "num_warps": 4, "num_stages": stages}
        given = (x, residual, gate, low["weight"], None)
        options = (40, False, False, False, False)
        y, h, mean, rstd = fused.launch_forward(*given, EPS, *options, True, config=config)
        upstream = [random(37, 40, seed=9 + i).float() for i in (0, 1)]
        dh = None if residual is None else upstream[1]
        saved = (x if residual is None else h, gate, low["weight"], None, mean, rstd)
        sums = {"rows": 16, "block": 16, "num_warps": 4}
        dx, dgate, dweight, _ = fused.launch_backward(
            upstream[0], dh, *saved, *options, residual is not None, config, sums
        )
        got = [y] if residual is None else [y, h]
        got += [dx] if residual is None else [dx, dx]
        got += [dweight] if gate is None else [dgate, dweight]
        assert max(errors(got, exact)) < 1e-6


@runs
def test_gradients_that_are_not_given():
    """Of y alone, or of h alone."""
    tensors = inputs("add", (6, 24))
    for which in (0, 1):
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            leaves = [keep_strides(z, dtype) for z in tensors.values()]
            out = norm.add_rms_norm(*leaves, eps=EPS, backend=backend)[which]
            grads = torch.autograd.grad(
                out, leaves, random(6, 24, seed=9).to(dtype), allow_unused=True
            )
            results.append([grads[0], grads[1]])
        assert max(errors(*results)) < 1e-6


@runs
def test_nothing_is_kept_without_gradients():
    x, weight = random(4, 24, seed=0).float(), random(24, seed=1).float()
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            kept = fused.forward(x, None, None, weight, None, EPS, 24, True, *(False,) * 3, wanted)
        assert [z.numel() for z in kept] == [96, 0, *([4, 4] if wanted else [0, 0])]


@runs
def test_operators_are_registered_soundly():
    """Schema, fake implementation, autograd registration and tracing of the forward operator."""
    x, other = (random(2, 3, 24, seed=s).float().requires_grad_() for s in (0, 1))
    weight, bias = (random(24, seed=s).float().requires_grad_() for s in (2, 3))
    for residual, gate, offset, centered in (
        (None, None, None, False),
        (other, None, bias, True),
        (None, other, None, False),
    ):
        options = (EPS, 24, centered, False, False, False, True)
        arguments = (x, residual, gate, weight, offset, *options)
        torch.library.opcheck(torch.ops.llmtrain.norm_forward, arguments)


@runs
@pytest.mark.parametrize("form", ["rms", "add", "gate_first", "layer_bias"])
def test_compiles_as_one_graph(form):
    tensors = inputs(form, (2, 5, 24))
    function = call(form, None, "triton")

    def step(**leaves):
        made = function(**leaves)
        made = made if isinstance(made, tuple) else (made,)
        return sum(z.square().sum() for z in made)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = {n: keep_strides(z, torch.float32) for n, z in tensors.items()}
        loss = run(**leaves)
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
def test_same_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    tensors = inputs("add", (5, 24))
    function = call("add", None, "triton")
    results = []
    for run in (
        lambda *z: function(**dict(zip(tensors, z))),
        lambda *z: checkpoint(
            lambda *y: function(**dict(zip(tensors, y))), *z, use_reentrant=False
        ),
    ):
        leaves = [keep_strides(z, torch.float32) for z in tensors.values()]
        y, h = run(*leaves)
        results.append([y, h, *torch.autograd.grad((y.square() + h).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
