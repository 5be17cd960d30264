"""The norms' Triton kernels: as Triton's interpreter runs them on a CPU (in a process of its own),
compiled for a GPU that need not be there, and on a GPU."""

import functools
import re
from collections import defaultdict

import pytest
import torch
from llmtrain_kernels import norm
from llmtrain_kernels.bench import norm as bench
from llmtrain_kernels.launch import pinned, tables
from llmtrain_kernels.norm import fused
from offline import (
    DEVICE,
    INTERPRETED,
    MEASURED,
    compile_for_hopper,
    hosts,
    run_in_interpreter,
    runs,
)
from torch.utils.checkpoint import checkpoint

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
        return made.detach().fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(fused.torch, "empty", poison)


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=80)


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
def test_launches_of_other_shapes_agree(form, monkeypatch):
    """Any number of rows, programs and stages, partial tiles, gains that are read every time."""
    tensors = inputs(form, (37, 40))
    exact = with_gradients(call(form, None, "reference"), tensors, {"": torch.float64})
    low = {n: z.float() for n, z in tensors.items()}
    x, residual, gate = (low.get(n) for n in ("x", "residual", "gate"))
    for rows, programs, stages, held in (
        (1, 1, 2, 0),
        (4, 3, 1, 64),
        (16, 0, 1, 0),
        (64, 1, 3, 64),
    ):
        monkeypatch.setattr(fused, "HELD", held)
        config = {"rows": rows, "programs": programs, "num_warps": 4, "num_stages": stages}
        given = (x, residual, gate, low["weight"], None)
        options = (40, False, False, False, False)
        y, h, mean, rstd = fused.launch_forward(*given, EPS, *options, True, config=config)
        upstream = [random(37, 40, seed=9 + i).float() for i in (0, 1)]
        dh = None if residual is None else upstream[1]
        saved = (x if residual is None else h, gate, low["weight"], None, mean, rstd)
        dx, dgate, dweight, _ = fused.launch_backward(
            upstream[0], dh, *saved, *options, residual is not None, config
        )
        got = [y] if residual is None else [y, h]
        got += [dx] if residual is None else [dx, dx]
        got += [dweight] if gate is None else [dgate, dweight]
        assert max(errors(got, exact)) < 1e-6


@runs
@pytest.mark.parametrize("sums", [1, 2])
def test_partial_sums_are_added(sums):
    partial = random(37, sums, 40, seed=0).float()
    for rows, block in ((1, 64), (16, 16), (64, 8)):
        made = [torch.full((40,), float("nan"), device=DEVICE) for _ in range(sums)]
        config = {"rows": rows, "block": block, "num_warps": 4}
        fused.add_partials(partial, made[0], made[1] if sums == 2 else None, config)
        torch.testing.assert_close(torch.stack(made), partial.sum(0))


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
    tensors, function = inputs("add", (5, 24)), call("add", None, "triton")

    def plain(*given):
        return function(**dict(zip(tensors, given)))

    results = []
    for run in (plain, functools.partial(checkpoint, plain, use_reentrant=False)):
        leaves = [z.float().requires_grad_() for z in tensors.values()]
        y, h = run(*leaves)
        results.append([y, h, *torch.autograd.grad((y.square() + h).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


ENTRIES = [
    (device, name, entry.get("up_to", fused.WIDEST))
    for device in MEASURED
    for name, entries in tables(device).items()
    if "norm" in name and name != "norm_sum"
    for entry in entries
]


def compiled(name, width, form, config):
    """Facts of a kernel for contiguous bfloat16 rows of that width and float32 gains."""
    from llmtrain_kernels.norm import kernels

    tiled, backward = fused.tile(width, config), name.endswith("bwd")
    given = dict.fromkeys(("p_x", "p_y", "p_dy", "p_dx"), "*bf16")
    if "add" in form:
        given |= {"p_residual": "*bf16", "p_h": "*bf16", "p_dh": "*bf16"}
    if "gate" in form or "sigmoid" in form:
        given |= {"p_gate": "*bf16", "p_dgate": "*bf16"}
    wide = ["p_weight", "p_rstd", "p_partial"]
    wide += ["p_bias"] if "bias" in form else []
    wide += ["p_mean"] if "layer" in form else []
    given |= dict.fromkeys(wide, "*fp32")
    kernel = kernels.norm_bwd_kernel if backward else kernels.norm_fwd_kernel
    names = [parameter.name for parameter in kernel.params]
    outer = tuple(n for n in names if n.endswith("_outer"))
    types = defaultdict(lambda: "i32", {**given, "eps": "fp32"})
    constants = {n: None for n in names if n.startswith("p_") and n not in given}
    constants |= {"inner": 1, "G": 1, "W": width, **dict.fromkeys(("ZERO_CENTERED", "SAVE"), True)}
    constants |= {"CENTERED": "layer" in form, "GATE_FIRST": form == "gate_first"}
    constants |= {"SIGMOID": "sigmoid" in form, "HOLD": config["programs"] > 0}
    constants |= fused.backward_options(tiled) if backward else {}
    constants |= {key: value for key, value in tiled.items() if key != "num_warps"}
    warps = {"num_warps": tiled["num_warps"], "num_stages": tiled["STAGES"]}
    constants = {n: value for n, value in constants.items() if n in names}
    return compile_for_hopper(kernel, types, constants, divisible=outer, **warps)


@hosts
@pytest.mark.parametrize(("device", "name", "width"), ENTRIES)
def test_registers_suffice(device, name, width):
    """No spills, but for gradients of the widest rows, and 16 bytes at a time of every row."""
    forms = {"norm": ["rms"], "layer": ["layer_bias"], "add": ["add"]}
    forms["gated"] = ["gate_first", "gate_last"]
    config = pinned(name, device, width)
    for form in forms[name.split("_")[0]]:
        facts = compiled(name, width, form, config)
        assert facts.spilled == 0 or (width == fused.WIDEST and name.endswith("bwd")), form
        moved = re.findall(r"(?:cp\.async\.cg|(?:ld|st)\.global\S*\.v4)", facts.ptx)
        assert len(moved) >= 2 * config["rows"] * width / 8 / (32 * config["num_warps"]), form


@hosts
@pytest.mark.parametrize("form", ["rms", "layer_bias", "gate_first"])
def test_rows_do_not_wait_for_gains(form):
    """A program of one row asks for it first, and gains come in its layout: of shared memory there
    is no more than a sum a warp."""
    name = {"rms": "norm_fwd", "layer_bias": "layer_norm_fwd", "gate_first": "gated_norm_fwd"}[form]
    config = {"rows": 1, "programs": 0, "num_warps": 4, "num_stages": 1}
    facts = compiled(name, 4096, form, config)
    reads = re.findall(r"ld\.global\S*(evict_\w+)", facts.ptx)
    assert set(reads) == {"evict_first", "evict_last"}
    assert reads == sorted(reads)
    assert facts.shared == 4 * config["num_warps"]


@hosts
def test_candidates_for_every_size_that_is_tuned():
    """Some suit each, all have the table's keys; the widest rows are tuned, for the last class."""
    found = bench.candidates()
    widest = {}
    for name, width, _ in bench.tunings(torch.device("cpu")):
        assert {frozenset(config) for config in found[name]} == {frozenset(pinned(name, "h100", 1))}
        widest[name] = width
        if name != "norm_sum":
            suited = [each(width, config) for config in found[name]]
            assert sum(8 <= n <= 32 for n in suited) >= 3, (name, width)
    assert widest.pop("norm_sum") == 4096
    assert set(widest.values()) == {fused.WIDEST}
    assert {*widest, "norm_sum"} == {name for name in tables("h100") if "norm" in name}


def each(width, config):
    return config["rows"] * fused.tile(width, config)["BLOCK"] // (32 * config["num_warps"])


@hosts
@pytest.mark.parametrize("device", MEASURED)
def test_sum_of_partials_compiles(device):
    from llmtrain_kernels.norm.kernels import norm_sum_kernel

    config = dict(pinned("norm_sum", device, 4096))
    constants = {"p_dbias": None, "D": 4096, "ROWS": config["rows"], "BLOCK": config["block"]}
    types = {"p_partial": "*fp32", "p_dweight": "*fp32", "programs": "i32"}
    facts = compile_for_hopper(norm_sum_kernel, types, constants, num_warps=config["num_warps"])
    assert facts.spilled == 0
    assert ".v4" in facts.ptx


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(16384, 4096), (4, 1000, 16, 128), (512, 5632)], ids=str)
def test_bfloat16_errs_as_torch_does(form, shape):
    """Against float64; gains and offsets are float32 for both. And the same twice."""
    tensors = {n: z.bfloat16() for n, z in inputs(form, shape).items()}
    dtypes = {"": torch.bfloat16, "weight": torch.float32, "bias": torch.float32}
    exact = with_gradients(call(form, None, "reference"), tensors, {"": torch.float64})
    theirs = with_gradients(call(form, None, "torch"), tensors, dtypes)
    got, again = (with_gradients(call(form, None, "triton"), tensors, dtypes) for _ in range(2))
    for mine, torchs in zip(errors(got, exact), errors(theirs, exact), strict=True):
        assert mine <= 1.1 * torchs + 1e-6
    torch.testing.assert_close(got, again, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
def test_in_a_cuda_graph_and_in_compiled_code():
    tensors = {n: z.bfloat16() for n, z in inputs("add", (512, 2048)).items()}
    function = call("add", None, "triton")
    expected = with_gradients(function, tensors, {"": torch.bfloat16})
    compiled_function = torch.compile(function, fullgraph=True)
    got = with_gradients(compiled_function, tensors, {"": torch.bfloat16})
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = function(**tensors)
    for z in captured:
        z.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(list(captured), expected[:2], rtol=0, atol=0)
