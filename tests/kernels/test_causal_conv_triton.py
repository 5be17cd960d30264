"""The causal convolution's Triton kernels: as Triton's interpreter runs them on a CPU (in a process
of its own), compiled for a GPU that need not be there, and on a GPU."""

import itertools
from collections import defaultdict

import pytest
import torch
from llmtrain_kernels import launch
from llmtrain_kernels.bench.causal_conv import candidates
from llmtrain_kernels.causal_conv import causal_conv, fused
from llmtrain_kernels.causal_conv.fused import launch_backward, launch_forward, meta, spans, units
from offline import (
    DEVICE,
    INTERPRETED,
    MEASURED,
    compile_for_hopper,
    hosts,
    run_in_interpreter,
    runs,
)

pytest.importorskip("triton")

# B, T, D, W: one token, fewer than the window, several spans of 16 and blocks of 128 channels
SHAPES = [(1, 1, 5, 4), (2, 3, 130, 8), (2, 37, 5, 4), (1, 18, 19, 2), (1, 5, 3, 1)]
SHAPES += [] if INTERPRETED else [(2, 1000, 131, 4), (3, 65, 96, 3), (1, 64, 512, 8)]
SMALL = {
    "block_d": 32,
    "rows": 2,
    "programs": 10**6,
    "num_warps": 1,
    "num_stages": 1,
    "maxnreg": 255,
}
LARGE = {"block_d": 64, "rows": 5, "programs": 1, "num_warps": 1, "num_stages": 1, "maxnreg": 255}


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def inputs(batch, tokens, width, window):
    """x, weight, bias, state."""
    shapes = (batch, tokens, width), (width, window), (width,), (batch, window - 1, width)
    return [random(*shape, seed=i) for i, shape in enumerate(shapes)]


def documents(batch, tokens):
    generator = torch.Generator().manual_seed(tokens)
    starts = torch.rand(batch, tokens, generator=generator) < 0.15
    return starts.cumsum(dim=1, dtype=torch.int32).to(DEVICE)


def with_gradients(tensors, dtype, *, weight_dtype=None, **options):
    """[y, state, and gradients of everything for random gradients of these]. tensors: x, weight,
    and bias and state if any."""
    dtypes = [dtype, *[weight_dtype or dtype] * 2, dtype]
    leaves = [z.detach().to(d).requires_grad_() for z, d in zip(tensors, dtypes)]
    if len(leaves) > 3:
        options["initial_state_BWD"] = leaves[3]
    ends = [*causal_conv(*leaves[:3], return_state=True, **options)]
    gradients = [random(*z.shape, seed=9).to(dtype) for z in ends]
    return [*ends, *torch.autograd.grad(ends, leaves, gradients)]


def errors(got, expected):
    """Frobenius norms, relative to those of what is expected (1 where that is zero)."""
    pairs = zip(got, expected, strict=True)
    return [((a.double() - b).norm() / (b.norm() or 1.0)).item() for a, b in pairs]


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=20)


@runs
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
@pytest.mark.parametrize(("batch", "tokens", "width", "window"), SHAPES)
def test_as_precise_as_the_reference_in_float32(batch, tokens, width, window, start):
    tensors, options = inputs(batch, tokens, width, window), {}
    if start != "state":
        tensors.pop()
    if start == "documents":
        options["doc_ids_BT"] = documents(batch, tokens)
    exact = with_gradients(tensors, torch.float64, backend="reference", **options)
    plain = with_gradients(tensors, torch.float32, backend="reference", **options)
    got = with_gradients(tensors, torch.float32, backend="triton", **options)
    for mine, reference in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine < 2 * reference + 2e-7


@runs
@pytest.mark.parametrize("activation", ["silu", None])
def test_without_bias_nor_activation(activation):
    tensors = inputs(1, 6, 9, 4)[:2]
    exact = with_gradients(tensors, torch.float64, activation=activation, backend="reference")
    got = with_gradients(tensors, torch.float32, activation=activation, backend="triton")
    assert max(errors(got, exact)) < 5e-7
    x, weight = (z.float() for z in tensors)
    alone, state = causal_conv(x, weight, activation=activation, backend="triton")
    assert state is None
    torch.testing.assert_close(alone, got[0], rtol=0, atol=0)


@runs
def test_strides():
    """A slice of a wider projection, tokens that are far apart, weights and gradients that are not
    contiguous: the same numbers."""
    x, weight, bias, _ = (z.float() for z in inputs(2, 5, 8, 4))
    expected = launch_forward(x, weight, bias, None, None, True, True)
    projection = torch.cat([x[..., :3], x, x[..., :2]], dim=-1)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    turned = x.mT.contiguous().mT
    for other in (projection[..., 3:11], apart, turned):
        got = launch_forward(other, weight.mT.contiguous().mT, bias, None, None, True, True)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    sums, ones = [], torch.ones_like(x)
    for dy in (ones, ones[:1, :1, :1].expand_as(ones), ones.mT.contiguous().mT):
        sums.append(launch_backward(dy, None, x, weight, bias, None, None, True))
    torch.testing.assert_close(sums[1], sums[0], rtol=0, atol=0)
    torch.testing.assert_close(sums[2], sums[0], rtol=0, atol=0)


@runs
@pytest.mark.parametrize("start", ["state", "documents"])
def test_every_configuration_gives_the_same(start):
    """Bit by bit in the interpreter, but for sums over tokens."""
    x, weight, bias, state = (z.float() for z in inputs(2, 21, 40, 4))
    dy = random(2, 21, 40, seed=7).float()
    given = (state, None) if start == "state" else (None, documents(2, 21))
    forward, backward = [], []
    for config in (SMALL, LARGE):
        forward.append(launch_forward(x, weight, bias, *given, True, True, config=config))
        backward.append(launch_backward(dy, state, x, weight, bias, *given, True, config=config))
    near = {"rtol": 1e-5, "atol": 1e-5}
    same = {"rtol": 0, "atol": 0} if INTERPRETED else near
    torch.testing.assert_close(*forward, **same)
    for i, (a, b) in enumerate(zip(*backward, strict=True)):
        torch.testing.assert_close(a, b, **(same if i in (0, 3) else near))


@runs
def test_a_row_may_be_split_anywhere():
    x, weight, bias, _ = (z.float() for z in inputs(1, 7, 6, 4))
    whole = launch_forward(x, weight, bias, None, None, True, True)
    for cut in (1, 4):
        first, state = launch_forward(x[:, :cut], weight, bias, None, None, True, True)
        second, last = launch_forward(x[:, cut:], weight, bias, state, None, True, True)
        together = torch.cat([first, second], dim=1), last
        torch.testing.assert_close(together, whole, rtol=0, atol=0)


@runs
def test_nothing_leaks_between_documents_nor_from_memory():
    """Not-a-number of one document stays there; what was in the outputs' memory is overwritten."""
    x, weight, bias, _ = (z.float() for z in inputs(1, 9, 6, 4))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]], device=DEVICE)
    x[:, 3:7] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2, device=DEVICE).isnan().all()
        y, last = launch_forward(x, weight, bias, None, ids, True, True)
        made = launch_backward(torch.ones_like(x), last, x, weight, bias, None, ids, True)
    finally:
        torch.use_deterministic_algorithms(False)
    clean = torch.tensor([0, 1, 2, 7, 8])
    assert y[:, clean].isfinite().all()
    assert y[:, 3:7].isnan().all()
    assert made[0][:, clean].isfinite().all()
    assert last.isfinite().all()
    assert (last[:, 0] == 0).all()


@runs
@pytest.mark.parametrize("config", [SMALL, {**SMALL, "rows": 8}])
def test_documents_may_begin_anywhere(config):
    """Row i's second document with token i, the third two later: within a span of 16 tokens, a
    turn, and the tokens beyond a span that it reads."""
    tokens = 24
    x, weight, bias, _ = (z.float() for z in inputs(tokens, tokens, 6, 4))
    dy, dlast = (random(tokens, n, 6, seed=7).float() for n in (tokens, 3))
    starts = torch.eye(tokens, dtype=torch.int32) + torch.eye(tokens, dtype=torch.int32).roll(2, 1)
    ids = starts.cumsum(dim=1, dtype=torch.int32).to(DEVICE)
    leaves = [z.requires_grad_() for z in (x, weight, bias)]
    expected = causal_conv(*leaves, doc_ids_BT=ids, return_state=True, backend="chunked")
    gradients = torch.autograd.grad(expected, leaves, (dy, dlast))
    given = (*(z.detach() for z in leaves), None, ids, True)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(launch_forward(*given, True, config=config), expected, **near)
    got = launch_backward(dy, dlast, *given, config=config)[:3]
    torch.testing.assert_close(got, gradients, **near)


@runs
def test_inputs_of_any_size():
    values = torch.tensor([-3e38, -1e30, -100.0, 0.0, 1e-30, 100.0, 1e30, 3e38])
    pick = torch.randint(8, (1, 9, 6), generator=torch.Generator().manual_seed(0))
    x = values[pick].double().to(DEVICE)
    weight = 0.2 * random(6, 4, seed=1).tanh()
    got = with_gradients([x, weight], torch.float32, backend="triton")
    expected = with_gradients([x, weight], torch.float32, backend="chunked")
    assert got[0].isfinite().all()
    assert got[2].isfinite().all()
    for a, b in zip((got[0], got[2]), (expected[0], expected[2]), strict=True):
        # a sum of +-20 is off by some 4e-6 and its exponential by that share, fused products or not
        torch.testing.assert_close(a, b, rtol=5e-5, atol=1e-30)


@runs
def test_gradients_have_the_dtypes_of_their_inputs():
    x, weight, bias, state = (z.float().requires_grad_() for z in inputs(1, 3, 4, 2))
    x, state = (z.detach().half().requires_grad_() for z in (x, state))
    y, last = fused(x, weight, bias, initial_state_BWD=state, return_state=True)
    assert y.dtype == last.dtype == torch.float16
    leaves = (x, weight, bias, state)
    made = torch.autograd.grad((y.sum(), last.sum()), leaves)
    assert [z.dtype for z in made] == [z.dtype for z in leaves]
    assert [z.shape for z in made] == [z.shape for z in leaves]


@runs
def test_operators_are_registered_soundly():
    """Schema, fake implementation, autograd registration and tracing of the forward operator."""
    x, weight, bias, state = (z.float().requires_grad_() for z in inputs(2, 3, 5, 4))
    operator = torch.ops.llmtrain.causal_conv_forward
    for given in ((bias, state, None), (None, None, documents(2, 3))):
        torch.library.opcheck(operator, (x, weight, *given, True, True))


@runs
def test_compiles_as_one_graph():
    tensors = inputs(2, 4, 8, 4)[:3]

    def step(x, weight, bias, ids):
        return causal_conv(x, weight, bias, doc_ids_BT=ids, backend="triton")[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ids in (None, documents(2, 4)):
        results = []
        for call in (step, compiled):
            leaves = [z.detach().float().requires_grad_() for z in tensors]
            loss = call(*leaves, ids)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
def test_only_arguments_are_kept():
    x, weight, bias, _ = (z.float().requires_grad_() for z in inputs(1, 20, 8, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: kept.append(z) or z, lambda z: z):
        y, _ = causal_conv(x * 1, weight * 1, bias, backend="triton")
    del y
    assert sum(z.nbytes for z in kept) <= 2 * (x.nbytes + weight.nbytes + bias.nbytes)


@hosts
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1000, 4096])
@pytest.mark.parametrize("programs", [1, 500, 10**6])
@pytest.mark.parametrize("rows", [4, 6, 8])
def test_spans_cover_rows(tokens, programs, rows):
    span, n_spans = spans(3, tokens, 5, programs, rows)
    assert span % rows == 0
    assert (n_spans - 1) * span < tokens <= n_spans * span


@hosts
def test_units():
    assert units(4352, 8 * 419) == 8
    assert units(4352, 4, 0) == 4
    assert units(7) == 1


VARIANTS = {
    "dense": {"p_state": None, "p_ids": None, "p_last": None, "p_dlast": None, "p_dstate": None},
    "packed": {"p_state": None, "p_last": None, "p_dlast": None, "p_dstate": None},
    "state": {"p_ids": None},
}


def pinned_entries():
    for device, direction in itertools.product(MEASURED, ("fwd", "bwd")):
        for entry in launch.tables(device)[f"causal_conv_{direction}"]:
            yield device, direction, entry


@hosts
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("device", "direction", "entry"), pinned_entries())
def test_registers_suffice(device, direction, entry, variant):
    """bfloat16 with float32 weights: rows move 8 or 16 bytes a thread at once, and all
    that a thread works with stays in registers."""
    from llmtrain_kernels.causal_conv import kernels

    kernel = getattr(kernels, f"causal_conv_{direction}_kernel")
    types = defaultdict(lambda: "i32")
    types |= dict.fromkeys(("p_x", "p_y", "p_dy", "p_dx"), "*bf16")
    types |= dict.fromkeys(("p_state", "p_last", "p_dlast", "p_dstate"), "*bf16")
    types |= dict.fromkeys(("p_weight", "p_bias", "p_sums"), "*fp32") | {"p_ids": "*i32"}
    sizes = {"W": 4, "SILU": True, "ALIGN": 8, **meta(entry, 4, state=variant == "state")}
    limits = {name: sizes.pop(name) for name in ("num_warps", "maxnreg")}
    names = {parameter.name for parameter in kernel.params}
    facts = compile_for_hopper(
        kernel,
        types,
        {k: v for k, v in {**sizes, **VARIANTS[variant]}.items() if k in names},
        **limits,
    )
    assert facts.spilled == 0
    assert facts.registers <= limits["maxnreg"]
    elements = entry["block_d"] // (32 * entry["num_warps"])
    assert f"ld.global.v{elements // 2}.b32" in facts.ptx
    assert f"st.global.v{elements // 2}.b32" in facts.ptx


@hosts
@pytest.mark.parametrize("device", MEASURED)
def test_registers_of_the_second_reduction(device):
    from llmtrain_kernels.causal_conv.kernels import causal_conv_bwd_sum_kernel as kernel

    for entry in launch.tables(device)["causal_conv_bwd_sum"]:
        sizes = {"W": 4, "BLOCK_N": entry["block_n"], "BLOCK_D": entry["block_d"]}
        types = {
            "p_sums": "*fp32",
            "p_dweight": "*fp32",
            "p_dbias": "*fp32",
            "N": "i32",
            "D": "i32",
        }
        facts = compile_for_hopper(kernel, types, sizes, num_warps=entry["num_warps"])
        assert facts.spilled == 0


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("packed", [False, True])
def test_as_precise_as_torch_in_bfloat16(packed):
    """And the same numbers twice."""
    tensors = inputs(2, 1000, 384, 4)[:3]
    tensors[0] = tensors[0].bfloat16().double()
    options = {"doc_ids_BT": documents(2, 1000)} if packed else {}
    exact = with_gradients(tensors, torch.float64, backend="chunked", **options)
    low = {"dtype": torch.bfloat16, "weight_dtype": torch.float32, **options}
    got, again = (with_gradients(tensors, backend="triton", **low) for _ in range(2))
    plain = with_gradients(tensors, backend="chunked", **low)
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    for mine, torchs in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine <= 1.1 * torchs + 1e-6


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("packed", [False, True])
def test_every_candidate_gives_the_same(packed):
    """Those that the tuner measures, pipelined ones too, within one rounding to bfloat16."""
    x, weight, bias, _ = (z.float() for z in inputs(2, 300, 264, 4))
    x, dy = x.bfloat16(), random(2, 300, 264, seed=7).bfloat16()
    given = (x, weight, bias, None, documents(2, 300) if packed else None, True)
    expected, *sums = launch_backward(dy, None, *given, config=SMALL)[:3]
    y = launch_forward(*given, False, config=SMALL)[0]
    for config in candidates()["causal_conv_fwd"]:
        again = launch_forward(*given, False, config=config)[0]
        torch.testing.assert_close(again, y, rtol=2**-7, atol=1e-6)
    for config in candidates()["causal_conv_bwd"]:
        dx, *others = launch_backward(dy, None, *given, config=config)[:3]
        torch.testing.assert_close(dx, expected, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(others, sums, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@hosts
def test_compiled_and_captured_on_a_gpu():
    """By torch.compile's own backend as one graph, and as a CUDA graph."""
    x, weight, bias, _ = (z.float().requires_grad_() for z in inputs(2, 100, 256, 4))
    x = x.detach().bfloat16().requires_grad_()
    ids = documents(2, 100)

    def step():
        y, _ = causal_conv(x, weight, bias, doc_ids_BT=ids)
        return torch.autograd.grad(y.float().square().sum(), (x, weight, bias))

    expected = step()
    compiled = torch.compile(causal_conv, fullgraph=True)(x, weight, bias, doc_ids_BT=ids)[0]
    torch.testing.assert_close(compiled, causal_conv(x, weight, bias, doc_ids_BT=ids)[0])
    del compiled  # its graph would hold the stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
