"""The gated linear units' Triton kernels: as Triton's interpreter runs them on a CPU (in a process
of its own), compiled for a GPU that need not be there, and on a GPU."""

import pytest
import torch
from llmtrain_kernels import launch
from llmtrain_kernels.glu import ACTIVATIONS, cost, glu
from llmtrain_kernels.glu.fused import forward, run_backward, run_forward
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

# leading dimensions and F: one row, one column, ragged blocks and rows
SHAPES = [((1,), 1), ((3,), 7), ((2, 5), 33), ((1,), 1500)]
SHAPES += [] if INTERPRETED else [((130,), 5632), ((3, 700), 1000), ((2, 3, 4), 14336)]
EXTREME = [-3e38, -1e20, -100.0, -16.5, -9.0, -1e-30, 0.0, 1e-30, 9.0, 16.5, 100.0, 1e20, 3e38]


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def with_gradients(gate_up, dtype, **options):
    """[y, the gradient of gate_up for random gradients of y]."""
    leaf = gate_up.detach().to(dtype).requires_grad_()
    y = glu(leaf, **options)
    return [y, *torch.autograd.grad(y, leaf, random(*y.shape, seed=1).to(dtype))]


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
    run_in_interpreter(__file__, at_least=24)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("lead", "hidden"), SHAPES)
def test_as_precise_as_the_reference_in_float32(lead, hidden, activation):
    gate_up = 3 * random(*lead, 2 * hidden, seed=0)
    exact = with_gradients(gate_up, torch.float64, activation=activation, backend="reference")
    plain = with_gradients(gate_up, torch.float32, activation=activation, backend="reference")
    got = with_gradients(gate_up, torch.float32, activation=activation, backend="triton")
    for mine, reference in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine < 2 * reference + 2e-7


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(activation):
    gate = torch.tensor(EXTREME, dtype=torch.float64, device=DEVICE)
    gate_up = torch.cat([gate, torch.full_like(gate, -0.5)]).float()
    exact = with_gradients(gate_up, torch.float64, activation=activation, backend="reference")
    got = with_gradients(gate_up, torch.float32, activation=activation, backend="triton")
    for mine, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, expected.float(), rtol=2e-6, atol=2e-6)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", [(1, 16, 1), (4, 8, 1), (2, 64, 4), (8, 1, 2)])
def test_every_launch_gives_the_same(config):
    """Rows, columns, warps of a program."""
    chosen = dict(zip(("rows", "block", "num_warps"), config, strict=True), num_stages=1)
    gate_up, dy = random(5, 2 * 37, seed=0).float(), random(5, 37, seed=1).float()
    for run, arguments in ((run_forward, (gate_up,)), (run_backward, (dy, gate_up))):
        got, pinned = run(*arguments, "silu", chosen), run(*arguments, "silu")
        torch.testing.assert_close(got, pinned, rtol=0, atol=0)


@runs
@pytest.mark.usefixtures("poisoned")
def test_rows_may_lie_apart():
    """Views of something wider, transposed, and gradients of all kinds of strides."""
    wide = random(3, 4, 50, seed=0).float()
    views = [wide[..., 3:37], wide.transpose(0, 1)[..., :34], wide[:, ::2, 10:44], wide[..., ::2]]
    views += [wide[:, 0, :34], wide[0, 0, :34], wide[:0, :, :34]]
    for view in views:
        view = view[..., : view.shape[-1] // 2 * 2]
        whole = view.contiguous()
        hidden = view.shape[-1] // 2
        shape = (*view.shape[:-1], hidden)
        gradients = [random(*shape, seed=1).float(), torch.ones(()).to(DEVICE).expand(shape)]
        gradients += [random(*shape[:-1], 2 * hidden, seed=2).float()[..., ::2]]
        for dy in gradients:
            results = []
            for x in (view, whole):
                leaf = x.detach().requires_grad_()
                y = glu(leaf, backend="triton")
                assert y.is_contiguous()
                results.append([y, *torch.autograd.grad(y, leaf, dy)])
            torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
def test_only_the_projection_is_kept():
    leaf = random(4, 20, seed=0).float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        glu(leaf, backend="triton")
    assert [x.data_ptr() for x in kept] == [leaf.data_ptr()]
    assert cost(4, hidden=10, dtype=leaf.dtype)[0].saved_bytes == kept[0].nbytes


@runs
def test_is_a_proper_operator():
    """Schema, fake implementation, autograd registration and tracing."""
    leaf = random(2, 3, 10, seed=0).float().requires_grad_()
    torch.library.opcheck(torch.ops.llmtrain.glu_forward, (leaf, "gelu"))
    dy = random(2, 3, 5, seed=1).float()
    torch.library.opcheck(torch.ops.llmtrain.glu_backward, (dy, leaf.detach(), "gelu"))


@runs
def test_compiles_as_one_graph():
    def step(x):
        return glu(x, backend="triton").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaf = random(2, 3, 10, seed=0).float().requires_grad_()
        loss = call(leaf)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@runs
def test_under_activation_checkpointing():
    leaf = random(4, 20, seed=0).float().requires_grad_()

    def part(x):
        return glu(x.sin(), backend="triton").cos()

    plain = torch.autograd.grad(part(leaf).sum(), leaf)
    kept = torch.utils.checkpoint.checkpoint(part, leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(kept.sum(), leaf), plain, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu(activation, dtype):
    """Errors of torch's own formula at most, the same bits twice, in a graph, and compiled."""
    gate_up = (2 * random(777, 2 * 5632, seed=0)).to(dtype)
    exact = with_gradients(gate_up, torch.float64, activation=activation, backend="reference")
    plain = with_gradients(gate_up, dtype, activation=activation, backend="torch")
    got, again = (with_gradients(gate_up, dtype, activation=activation) for _ in range(2))
    for mine, theirs in zip(errors(got, exact), errors(plain, exact), strict=True):
        assert mine <= 1.1 * theirs
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    compiled = torch.compile(lambda x: forward(x, activation), fullgraph=True)
    torch.testing.assert_close(compiled(gate_up), got[0], rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = glu(gate_up, activation=activation)
    graph.replay()
    torch.testing.assert_close(captured, got[0], rtol=0, atol=0)


@hosts
@pytest.mark.parametrize("device", TABLES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [5632, 14336])
def test_registers_suffice(hidden, activation, device):
    """Full vectors, nothing through shared memory, and registers for many programs at a time."""
    from llmtrain_kernels.glu.kernels import glu_bwd_kernel, glu_fwd_kernel

    types = dict.fromkeys(("p_gate_up", "p_y", "p_dy", "p_dgate_up"), "*bf16")
    types |= dict.fromkeys(("X", "stride", "dy_stride"), "i32")
    moves = {"glu_fwd": (glu_fwd_kernel, 2, 1), "glu_bwd": (glu_bwd_kernel, 3, 2)}
    for name, (kernel, loads, stores) in moves.items():
        config = launch.pinned(name, device, hidden)
        facts = compile_for_hopper(
            kernel,
            types,
            {"ACTIVATION": activation, "F": hidden, "ROWS": config["rows"]}
            | {"BLOCK": config["block"]},
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            divisible=("stride", "dy_stride"),
        )
        assert facts.registers <= 48
        assert facts.spilled == facts.shared == 0
        vectors = config["rows"] * config["block"] // (256 * config["num_warps"])
        assert facts.ptx.count("ld.global.v4.b32") == loads * vectors
        assert facts.ptx.count("st.global.v4.b32") == stores * vectors
