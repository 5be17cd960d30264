"""Rotary embedding's Triton kernel: as Triton's interpreter runs it on a CPU (in a process of its
own), compiled for a GPU that need not be there, and on a GPU."""

import pytest
import torch
from llmtrain_kernels import launch
from llmtrain_kernels.rope import cost, rope
from llmtrain_kernels.rope.fused import in_rows, run, turn, turned
from offline import (
    DEVICE,
    INTERPRETED,
    TABLES,
    compile_for_hopper,
    hosts,
    run_in_interpreter,
    runs,
)

pytest.importorskip("triton")

# B, T, H, G, width of q, of k, R, part
SHAPES = [
    (1, 1, 1, 1, 2, 2, 1, None),
    (2, 5, 6, 2, 16, 16, 8, None),
    (2, 3, 5, 5, 14, 14, 3, None),
    (1, 17, 3, 1, 13, 7, 2, 6),
]
if not INTERPRETED:
    SHAPES += [(3, 1000, 32, 8, 128, 128, 64, None), (2, 130, 12, 12, 64, 64, 32, None)]
    SHAPES += [(2, 77, 25, 25, 80, 80, 10, None), (1, 100, 128, 1, 192, 64, 32, 64)]


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(batch, tokens, heads, groups, q_width, k_width, half):
    """q and k in float64, cos and sin."""
    q = random(batch, tokens, heads, q_width, seed=0)
    k = random(batch, tokens, groups, k_width, seed=1)
    return [q, k, *angles(batch, tokens, half)]


def angles(batch, tokens, half):
    """Of documents that begin anywhere, scaled."""
    theta = 100 * random(batch, tokens, half, seed=2)
    return [(1.3 * z).float() for z in (theta.cos(), theta.sin())]


def with_gradients(q, k, cos, sin, dtype, **options):
    """[q, k, their gradients for random gradients of what was turned]."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in (q, k)]
    made = rope(*leaves, cos, sin, **options)
    weights = [random(*z.shape, seed=9).to(dtype) for z in made]
    return [*made, *torch.autograd.grad(made, leaves, weights)]


def errors(got, expected):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


@pytest.fixture
def poisoned():
    """What is not written is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=18)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_precise_as_the_reference_in_float32(shape, interleaved):
    *sizes, part = shape
    tensors, options = inputs(*sizes), {"interleaved": interleaved, "part": part}
    exact = with_gradients(*tensors, torch.float64, backend="reference", **options)
    plain = with_gradients(*tensors, torch.float32, backend="reference", **options)
    got = with_gradients(*tensors, torch.float32, backend="triton", **options)
    for mine, reference in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine < 2 * reference + 2e-7


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [(1, 1), (8, 4), (64, 2)])
def test_every_launch_gives_the_same(config):
    """Pairs of a token and a head, warps of a program: a part of a token, several, and all."""
    chosen = dict(zip(("rows", "num_warps"), config, strict=True))
    tensors = [z.float() for z in inputs(2, 5, 6, 2, 16, 12, 4)]
    for inverse in (False, True):
        how = (False, 2, 0, inverse)
        torch.testing.assert_close(run(*tensors, *how, chosen), run(*tensors, *how))


@runs
@pytest.mark.usefixtures("poisoned")
def test_views_of_one_projection():
    """Queries and keys as parts of a packed row, heads with a gate between, heads before tokens;
    gradients of such strides too. Only elements apart from each other make a copy necessary."""
    batch, tokens, heads, groups, width, half = 2, 5, 4, 2, 8, 3
    cos, sin = angles(batch, tokens, half)
    packed = random(batch, tokens, (heads + 2 * groups) * width, seed=0).float()
    q, k, _ = packed.split([heads * width, groups * width, groups * width], dim=-1)
    gated = random(batch, tokens, heads, 2 * width, seed=1).float()[..., :width]
    before = random(batch, heads, tokens, width, seed=2).float().transpose(1, 2)
    every_second = random(batch, tokens, heads, 2 * width, seed=3).float()[..., ::2]
    keys = k.unflatten(-1, (groups, width))
    for queries in (q.unflatten(-1, (heads, width)), gated, before, every_second):
        assert not queries.is_contiguous()
        assert (in_rows(queries) is queries) == (queries is not every_second)
        weights = [queries, keys]
        results = []
        for tensors in ((queries, keys), (queries.contiguous(), keys.contiguous())):
            leaves = [z.detach().requires_grad_() for z in tensors]
            made = rope(*leaves, cos, sin, backend="triton")
            assert all(z.is_contiguous() for z in made)
            results.append([*made, *torch.autograd.grad(made, leaves, weights)])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
@pytest.mark.usefixtures("poisoned")
def test_keys_or_gradients_may_be_missing():
    q, k, cos, sin = (z.float() for z in inputs(2, 3, 4, 2, 8, 6, 2))
    options = {"part": 5, "backend": "triton"}
    leaves = [q.requires_grad_(), k.requires_grad_()]
    made = rope(*leaves, cos, sin, **options)
    alone, none = rope(q, None, cos, sin, **options)
    assert none is None
    both = torch.autograd.grad(made, leaves, made, retain_graph=True)
    torch.testing.assert_close(alone, made[0], rtol=0, atol=0)
    for which in (0, 1):
        (one,) = torch.autograd.grad(made[which], leaves[which], made[which], retain_graph=True)
        torch.testing.assert_close(one, both[which], rtol=0, atol=0)
    (one,) = torch.autograd.grad(alone, q, made[0])
    torch.testing.assert_close(one, both[0], rtol=0, atol=0)
    empty = rope(q[:, :0], k[:, :0], cos[:, :0], sin[:, :0], **options)
    assert [z.shape for z in empty] == [(2, 0, 4, 8), (2, 0, 2, 6)]


@runs
def test_rows_may_share_angles():
    q, k, cos, sin = (z.float() for z in inputs(3, 4, 2, 1, 8, 8, 4))
    shared = rope(q, k, cos[:1], sin[:1], backend="triton")
    expanded = (z[:1].expand(3, -1, -1) for z in (cos, sin))
    torch.testing.assert_close(shared, rope(q, k, *expanded, backend="triton"), rtol=0, atol=0)


@runs
def test_only_angles_are_kept():
    q, k, cos, sin = inputs(2, 3, 4, 2, 8, 8, 4)
    q, k = (z.float().requires_grad_() for z in (q, k))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rope(q, k, cos, sin, backend="triton")
    assert [x.data_ptr() for x in kept] == [cos.data_ptr(), sin.data_ptr()]
    sizes = {"heads": 4, "kv_heads": 2, "k_width": 8, "turned": 8, "dtype": q.dtype}
    assert cost(6, **sizes)[0].saved_bytes == sum(x.nbytes for x in kept)


@runs
def test_is_a_proper_operator():
    """Schema, fake implementation, autograd registration and tracing."""
    q, k, cos, sin = inputs(2, 3, 4, 2, 8, 8, 3)
    q, k = (z.float().requires_grad_() for z in (q, k))
    operator = torch.ops.llmtrain.rope_turn
    for keys in (k, None):
        torch.library.opcheck(operator, (q, keys, cos, sin, True, 2, 0, False))


@runs
@pytest.mark.usefixtures("poisoned")
def test_operator_and_direct_call_are_one():
    """Traced calls take the operator, others do without: the same results and gradients, also of
    the gradients."""
    q, k, cos, sin = (z.float() for z in inputs(2, 3, 4, 2, 8, 8, 3))
    how = (cos, sin, True, 2, 0, False)
    results = []
    for call in (turned, turn):
        leaves = [z.detach().requires_grad_() for z in (q, k)]
        made = call(*leaves, *how)
        upstream = [z.detach().requires_grad_() for z in made]
        first = torch.autograd.grad(made, leaves, upstream, create_graph=True)
        results.append([*made, *first, *torch.autograd.grad(first, upstream, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
def test_compiles_as_one_graph():
    tensors = [z.float() for z in inputs(2, 3, 4, 2, 8, 8, 3)]

    def step(q, k, cos, sin):
        return sum(z.square().cumsum(1).sum() for z in rope(q, k, cos, sin, backend="triton"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        q, k = (z.detach().requires_grad_() for z in tensors[:2])
        loss = call(q, k, *tensors[2:])
        results.append([loss, *torch.autograd.grad(loss, (q, k))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[-4:])
def test_on_a_gpu(shape, dtype, interleaved):
    """Errors of torch's own formula at most, the same bits twice, compiled, and in a graph."""
    torch._dynamo.reset()  # every case is its own code
    *sizes, part = shape
    q, k, cos, sin = inputs(*sizes)
    rounded, options = [q.to(dtype), k.to(dtype)], {"interleaved": interleaved, "part": part}
    exact = with_gradients(*rounded, cos, sin, torch.float64, backend="reference", **options)
    plain = with_gradients(*rounded, cos, sin, dtype, backend="torch", **options)
    got, again = (with_gradients(*rounded, cos, sin, dtype, **options) for _ in range(2))
    for mine, theirs in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine <= 1.1 * theirs
    torch.testing.assert_close(got, again, rtol=0, atol=0)

    def call():
        return rope(*rounded, cos, sin, **options)

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(list(compiled()), got[:2], rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.testing.assert_close(list(captured), got[:2], rtol=0, atol=0)


WIDE = ("q_row", "q_token", "q_head", "k_row", "k_token", "k_head", "angle_row")


@hosts
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("device", TABLES)
@pytest.mark.parametrize(
    ("heads", "groups", "widths", "half", "start"),
    [
        (32, 8, (128, 128), 64, 0),
        (16, 8, (128, 128), 64, 0),
        (12, 4, (64, 64), 32, 0),
        (32, 8, (128, 128), 16, 0),
        (128, 1, (192, 64), 32, 128),
        (8, 8, (256, 256), 128, 0),
    ],
)
def test_registers_suffice(device, heads, groups, widths, half, start, interleaved):
    """Full vectors (but for the narrowest, measured faster in shorter ones), nothing through shared
    memory, and registers for many programs at a time."""
    from llmtrain_kernels.rope.kernels import rope_kernel

    types = dict.fromkeys(("p_q", "p_k", "p_q_out", "p_k_out"), "*bf16")
    types |= {"p_cos": "*fp32", "p_sin": "*fp32", "T": "i32"} | dict.fromkeys(WIDE, "i32")
    config = launch.pinned("rope", device, half)
    constants = {"H": heads, "G": groups, "Q_WIDTH": widths[0], "K_WIDTH": widths[1], "R": half}
    constants |= {"Q_START": start, "K_START": 0, "INTERLEAVED": interleaved, "INVERSE": True}
    facts = compile_for_hopper(
        rope_kernel,
        types,
        {**constants, "ROWS": config["rows"]},
        num_warps=config["num_warps"],
        divisible=WIDE,
    )
    assert facts.registers <= 80
    assert facts.spilled == facts.shared == 0
    moved = [line for line in facts.ptx.splitlines() if "ld.global" in line or "st.global" in line]
    assert moved
    widths = (".v4.b32",) if half >= 32 else (".v4.b32", ".v2.b32")
    assert all(any(width in line for width in widths) for line in moved)
