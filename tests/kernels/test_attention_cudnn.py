"""cuDNN's attention over packed documents: its operators, and when it is chosen.

Without a GPU a stand-in executes plans. On one, the real plans run.
"""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cudnn_stand_in import EXACT, by_reference, documents, inputs, stand_in, with_gradients
from llmtrain_kernels.attention import (
    Case,
    attention,
    choice,
    cudnn,
    cudnn_plan,
    cudnn_shapes,
    select_backend,
)

H100 = Case(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    heads=12,
    kv_heads=4,
    k_width=64,
    v_width=64,
    documents=True,
    boundaries=True,
    training=True,
)


@pytest.fixture
def executed(monkeypatch):
    """Keys of plans that the stand-in executed."""
    keys = []

    def execute(key, *given):
        keys.append(key)
        return stand_in(key, *given)

    monkeypatch.setattr(cudnn_plan, "execute", execute)
    return keys


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("projection", [False, True])
def test_operators_over_a_stand_in(executed, causal, heads, groups, projection):
    qkv = inputs(2, 20, heads, groups, projection=projection)
    arguments = documents([3, 1, 16, 20], 2, empty=4)
    for options in ({}, {"scale": 0.2}):
        options = {**arguments, **options, "causal": causal}
        got = with_gradients(cudnn.run, qkv, **options)
        expected = with_gradients(by_reference, qkv, **options)
        torch.testing.assert_close(got, expected, **EXACT)
    assert [key.backward for key in executed] == [False, True] * 2


def test_widths_and_layouts(executed):
    """Keys wider than values; a gradient of o and inputs that no plan can address are copied."""
    qkv = inputs(1, 12, 4, 2, 32, 16)
    rows = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv]
    arguments = documents([5, 7], 1)
    expected = with_gradients(by_reference, qkv, **arguments)

    def transposed(*qkv, **arguments):
        return cudnn.run(*qkv, **arguments).transpose(1, 2).contiguous().transpose(1, 2)

    for given, call in ((qkv, cudnn.run), (rows, cudnn.run), (qkv, transposed)):
        torch.testing.assert_close(with_gradients(call, given, **arguments), expected, **EXACT)


def test_operators_are_registered_well(executed):
    """Fakes, schemas and the gradient, as torch.compile will take them."""
    qkv = [x.requires_grad_() for x in inputs(2, 6, 4, 2, 32, 16)]
    boundaries = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    how = (boundaries, 6, True, 0.2)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        cudnn.forward, (*qkv, *how), test_utils=(*tests, "test_aot_dispatch_dynamic")
    )
    o, lse = cudnn.forward(*qkv, *how)
    assert (lse.dtype, lse.shape, lse.requires_grad) == (torch.float32, (2, 6, 4, 1), False)
    given = [x.detach() for x in (torch.ones_like(o), *qkv, o, lse)]
    torch.library.opcheck(cudnn.backward, (*given, *how), test_utils=tests)


@pytest.mark.parametrize("projection", [False, True])
def test_operators_and_plain_calls_agree(executed, projection):
    qkv = inputs(2, 6, 4, 2, projection=projection)
    how = (torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6, True, 0.2)
    results = []
    for call in (cudnn.forward, cudnn.Attended.apply):
        leaves = [x.detach().requires_grad_() for x in qkv]
        o, lse = call(*leaves, *how)
        assert not lse.requires_grad
        do = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)
        results.append([o, lse, *torch.autograd.grad(o, leaves, do)])
        with torch.no_grad():
            results[-1] += call(*leaves, *how)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("call", [cudnn.forward, cudnn.Attended.apply])
def test_has_no_second_derivatives(executed, call):
    """An error, where a part of a sum might have been left out."""
    leaves = [x.requires_grad_() for x in inputs(1, 12, 4, 2)]
    o, _ = call(*leaves, torch.tensor([0, 5, 12], dtype=torch.int32), 7, True, 0.2)
    do = torch.ones_like(o).requires_grad_()

    def twice():
        made = torch.autograd.grad(o, leaves, do, create_graph=True)
        torch.autograd.grad(sum(x.sum() for x in (do, *made)), do)

    with pytest.raises(RuntimeError, match=r"no autograd formula|has no second derivatives"):
        twice()


def test_copies_and_numbers_are_made_once(monkeypatch):
    """The backward pass of a plain call takes those of the forward pass."""
    made = []
    addressable = cudnn_shapes.addressable

    def counted(x):
        y = addressable(x)
        made.extend([] if y is x else ["copy"])
        return y

    def told(key, tensors, cu_seqlens, numbers=None):
        made.extend(["numbers"] if numbers is None else [])
        return stand_in(key, tensors, cu_seqlens, numbers)

    monkeypatch.setattr(cudnn_shapes, "addressable", counted)
    monkeypatch.setattr(cudnn_plan, "execute", told)
    with_gradients(cudnn.run, inputs(1, 12, 4, 2, projection=True), **documents([5, 7], 1))
    assert made == ["copy"] * 3 + ["numbers"]


def test_compiles_for_any_documents(executed):
    """One graph, and no compilation for every new number of documents or longest document."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cudnn.run, fullgraph=True, backend=counter)
    qkv = inputs(1, 40, 2, 2)
    for every in (1, 2, 5, 8, 20, 40):
        arguments = {**documents([every] * (40 // every), 1), "max_seqlen": every}
        got = with_gradients(compiled, qkv, **arguments)
        torch.testing.assert_close(got, with_gradients(by_reference, qkv, **arguments), **EXACT)
    assert counter.frame_count <= 3


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(cudnn, "INSTALLED", True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)


def test_runs_packed_documents(installed):
    for change in ({}, {"causal": False}, {"k_width": 128}, {"training": False}):
        assert select_backend(replace(H100, **change), "cudnn").backend == "cudnn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "needs bfloat16 or float16 on CUDA"),
        ({"device": "cpu", "capability": None}, "needs bfloat16 or float16 on CUDA"),
        ({"capability": (8, 0)}, r"needs compute capability 9 or 10, this device has \(8, 0\)"),
        ({"capability": (12, 0)}, "needs compute capability 9 or 10"),
        ({"window": 8}, "has no window, sinks, softcap or cache"),
        ({"softcap": True}, "has no window, sinks, softcap or cache"),
        ({"cache": True, "documents": False}, "has no window, sinks, softcap or cache"),
        ({"documents": False}, "is for packed documents; sdpa has cuDNN's kernels for dense rows"),
        ({"boundaries": False}, "needs cu_seqlens and max_seqlen"),
        ({"k_width": 192}, "needs key and value widths of at most 128, multiples of 16, not 192"),
        ({"v_width": 72}, "needs key and value widths of .* multiples of 16, not 64 and 72"),
        ({"deterministic": True}, "has no deterministic backward pass"),
    ],
)
def test_what_it_cannot_run(installed, change, message):
    with pytest.raises(ValueError, match=f"attention backend=cudnn: {message}.*mixer.backend=auto"):
        select_backend(replace(H100, **change), "cudnn")


def test_what_it_needs(monkeypatch):
    monkeypatch.setattr(cudnn, "INSTALLED", False)
    with pytest.raises(ValueError, match=r"is not installed: pip install 'llmtrain\[cudnn\]'"):
        select_backend(H100, "cudnn")
    monkeypatch.setattr(cudnn, "INSTALLED", True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ValueError, match=r"needs cuDNN 9\.18, torch has 9\.10"):
        select_backend(H100, "cudnn")


def test_auto_may_name_it_first(installed, monkeypatch):
    order = ("cudnn", "varlen", "sdpa")
    monkeypatch.setattr(choice, "order", lambda *_, **__: order)
    chosen = select_backend(H100)
    assert (chosen.backend, chosen.reason) == ("cudnn", "skips hidden pairs")
    monkeypatch.setattr(cudnn, "INSTALLED", False)
    chosen = select_backend(H100)
    assert chosen.backend == "varlen"
    assert "cudnn is not installed" in chosen.reason


def test_a_case_knows_whether_torch_is_deterministic():
    assert not replace(H100).deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert Case(
            device="cpu",
            capability=None,
            dtype=torch.float32,
            heads=1,
            kv_heads=1,
            k_width=8,
            v_width=8,
        ).deterministic
    finally:
        torch.use_deterministic_algorithms(False)


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cudnn.INSTALLED, reason="needs nvidia-cudnn-frontend"),
]


def gpu(*names):
    return pytest.param(*names, marks=on_a_gpu)


def on_device(qkv, arguments, dtype):
    """Both on the GPU; q, k and v rounded, views as before."""
    whole = qkv[0]._base
    if whole is not None:
        sizes = [x.shape[2] for x in qkv]
        qkv = whole.to("cuda", dtype).split(sizes, dim=2)
    else:
        qkv = [x.to("cuda", dtype) for x in qkv]
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    return qkv, moved


def named(q, k, v, **arguments):
    return attention(q, k, v, backend="cudnn", **arguments)


def poison():
    """NaN in the memory that results and workspaces will have."""
    junk = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(4)]
    del junk


def assert_near_float64(got, qkv, **arguments):
    """At most twice the rounding of the reference in the same precision, and a little."""
    exact = with_gradients(by_reference, [x.double() for x in qkv], **arguments)
    own = with_gradients(by_reference, qkv, **arguments)
    eps = torch.finfo(qkv[0].dtype).eps
    for x, low, y in zip(got, own, exact):
        error, rounding = ((z.double() - y).norm() / y.norm() for z in (x, low))
        assert error < 2 * rounding + 2 * eps


LENGTHS = {
    "one": ([65], 1, 0),
    "half a bucket": ([1, 63, 64, 65, 7], 1, 3),
    "a whole bucket": ([32] * 16, 1, 0),
    "two rows": ([300, 1, 214, 515], 2, 60),
}


def check_on_a_gpu(qkv, lengths, rows, empty, *, dtype=torch.bfloat16, causal=True):
    qkv, arguments = on_device(qkv, documents(lengths, rows, empty), dtype)
    poison()
    got = with_gradients(named, qkv, causal=causal, **arguments)
    assert_near_float64(got, qkv, causal=causal, **arguments)


@pytest.mark.parametrize("cut", [gpu(name) for name in LENGTHS])
@pytest.mark.parametrize(
    ("heads", "groups", "widths", "projection"),
    [
        (4, 4, (64, 64), False),
        (4, 2, (128, 128), True),
        (6, 1, (64, 64), True),
        (4, 2, (128, 64), False),
        (2, 2, (80, 80), False),
        (2, 1, (16, 16), False),
    ],
)
def test_against_float64(cut, heads, groups, widths, projection):
    lengths, rows, empty = LENGTHS[cut]
    qkv = inputs(rows, sum(lengths) // rows, heads, groups, *widths, projection=projection)
    check_on_a_gpu(qkv, lengths, rows, empty)


@pytest.mark.parametrize("options", [gpu({"causal": False}), gpu({"dtype": torch.float16})])
@pytest.mark.parametrize("width", [64, 128])
def test_options_against_float64(options, width):
    check_on_a_gpu(inputs(1, 300, 4, 2, width), [200, 1, 99], 1, 5, **options)


@pytest.mark.parametrize("bound", [gpu(512), gpu(2048), gpu(8192)])
@pytest.mark.parametrize("empty", [0, 61, 509])
def test_wide_bounds_change_nothing(bound, empty, monkeypatch):
    """The forward pass to the bit; the sums of the backward pass have no fixed order."""
    lengths = [300, 7, 205]
    qkv, arguments = on_device(inputs(1, 512, 4, 2, 64), documents(lengths, 1), torch.bfloat16)
    expected = with_gradients(named, qkv, **arguments)
    arguments["cu_seqlens"] = documents(lengths, 1, empty)["cu_seqlens"].cuda()
    monkeypatch.setattr(cudnn_shapes, "rounded_longest", lambda *_: bound)
    got = with_gradients(named, qkv, **arguments)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1:], expected[1:], rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("mode", [gpu("eager"), gpu("inductor")])
def test_captured(mode):
    """A CUDA graph follows boundaries that change between replays."""
    torch._dynamo.reset()
    call = named if mode == "eager" else torch.compile(named, fullgraph=True)
    cuts = [documents(lengths, 2, 4) for lengths in ([300, 7, 205, 512], [100, 412, 3, 509])]
    qkv, first = on_device(inputs(2, 512, 4, 2, 64), cuts[0], torch.bfloat16)
    _, second = on_device(qkv, cuts[1], torch.bfloat16)
    expected = [with_gradients(named, qkv, **arguments) for arguments in (first, second)]
    leaves = [x.detach().requires_grad_() for x in qkv]
    generator = torch.Generator().manual_seed(9)
    do = torch.randn(leaves[0].shape, generator=generator, dtype=torch.float64).to(leaves[0])

    def step():
        o = call(*leaves, **first)
        return [o, *torch.autograd.grad(o, leaves, do)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for arguments, truth in ((first, expected[0]), (second, expected[1])):
        first["cu_seqlens"].copy_(arguments["cu_seqlens"])
        graph.replay()
        torch.testing.assert_close(made[0], truth[0], rtol=0, atol=0)
        torch.testing.assert_close(made[1:], truth[1:], rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("backend", [gpu("aot_eager"), gpu("inductor")])
def test_compiled(backend):
    torch._dynamo.reset()
    qkv = inputs(2, 512, 4, 2, 64, projection=True)
    arguments = documents([300, 7, 205, 512], 2)
    qkv, arguments = on_device(qkv, arguments, torch.bfloat16)
    compiled = torch.compile(named, fullgraph=True, backend=backend)
    got = with_gradients(compiled, qkv, **arguments)
    expected = with_gradients(named, qkv, **arguments)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1:], expected[1:], rtol=2**-6, atol=1e-3)
