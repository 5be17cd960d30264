"""AdamW's Triton kernels: in Triton's interpreter, compiled for a GPU that is not there, on one."""

from collections import defaultdict

import pytest
import torch
from llmtrain_kernels import tensor_lists
from llmtrain_kernels.adamw import adamw_step, sum_of_squares
from llmtrain_kernels.adamw.op import log
from llmtrain_kernels.launch import tables
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

KNOBS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SMALL = {"BLOCK": 64, "num_warps": 4}
LISTS = [[1], [64], [63, 1, 200], [5, 0, 130, 64, 3], [64, 144], [2048 * 3 + 5]]


def draw(sizes, seed, *, positive=False):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(n, generator=generator) for n in sizes]
    return [(z.square() * 1e-2 if positive else z).to(DEVICE) for z in found]


def state(sizes, count=3.0):
    """(p, g, m, v, steps)."""
    steps = [torch.tensor(count, device=DEVICE) for _ in sizes]
    p, g, m = (draw(sizes, seed) for seed in range(3))
    return p, g, m, draw(sizes, 3, positive=True), steps


def copied(lists, dtype=None):
    return [[z.clone() if dtype is None else z.to(dtype) for z in some] for some in lists]


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def close(got, expected, tolerance=4e-7):
    """Every element, relative to the largest of its tensor."""
    for kind, (some, others) in enumerate(zip(got, expected, strict=True)):
        for a, b in zip(some, others, strict=True):
            if a.numel():
                worst = (a.double() - b.double()).abs().max().item()
                assert worst <= tolerance * b.abs().max().item(), (kind, worst)


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=20)


@runs
@pytest.mark.parametrize("sizes", LISTS, ids=str)
@pytest.mark.parametrize("knobs", [{}, {"weight_decay": 0.0}, {"beta1": 0.0, "beta2": 0.999}])
def test_is_the_reference_in_float64(sizes, knobs):
    """From the first step on and late, with a divisor of the gradients."""
    for count, scale in ((0.0, None), (1.0, scalar(8.0)), (20000.0, scalar(0.3))):
        given = state(sizes, count)
        exact = copied(given, torch.float64)
        options = {**KNOBS, **knobs, "grad_scale": scale}
        adamw_step(*given, **options, backend="triton", config=SMALL)
        adamw_step(*exact, **options, backend="reference")
        close(given, exact)


@runs
def test_is_torchs():
    """The same numbers as torch.optim.AdamW within float32's rounding, over several steps."""
    sizes = [7, 300, 64]
    p, _, _, _, _ = state(sizes)
    mine, theirs = ([torch.nn.Parameter(z.clone()) for z in p] for _ in range(2))
    knobs = {k: v for k, v in KNOBS.items() if not k.startswith("beta")}
    optimizer = torch.optim.AdamW(theirs, betas=(0.9, 0.95), **knobs)
    m, v = ([torch.zeros_like(z) for z in p] for _ in range(2))
    steps = [scalar(0.0) for _ in sizes]
    for step in range(4):
        g = draw(sizes, 10 + step)
        for parameter, gradient in zip(theirs, g):
            parameter.grad = gradient.clone()
        optimizer.step()
        with torch.no_grad():
            adamw_step(mine, g, m, v, steps, **KNOBS, backend="triton", config=SMALL)
    close([mine], [theirs])
    moments = [[optimizer.state[z][kind] for z in theirs] for kind in ("exp_avg", "exp_avg_sq")]
    close([m, v], moments)
    assert [z.item() for z in steps] == [4.0] * 3


@runs
@pytest.mark.parametrize("sizes", [[100], [100, 30]], ids=str)
def test_a_skipped_step_changes_nothing(sizes):
    given = state(sizes)
    given[1][0][:] = torch.nan
    before, copies = copied(given), [torch.zeros(n, device=DEVICE).bfloat16() for n in sizes]
    options = {**KNOBS, "grad_scale": scalar(torch.nan), "copies": copies, "backend": "triton"}
    adamw_step(*given, **options, found_inf=scalar(1.0), config=SMALL)
    for some, others in zip(given, before):
        torch.testing.assert_close(some, others, rtol=0, atol=0, equal_nan=True)
    assert not any(copy.any() for copy in copies)
    options["grad_scale"] = None
    given[1][0].fill_(1.0)
    adamw_step(*given, **options, found_inf=scalar(0.0), config=SMALL)
    assert [z.item() for z in given[4]] == [4.0] * len(sizes)
    for copy, p in zip(copies, given[0]):  # the interpreter cuts bits off instead of rounding
        torch.testing.assert_close(copy, p.bfloat16(), rtol=2**-7 if INTERPRETED else 0, atol=0)


@runs
def test_extreme_gradients():
    """Zero, tiny and huge gradients, and no moments: finite, and the reference's."""
    values = torch.tensor([0.0, 1e-30, -1e-20, 1e-8, 1.0, -1e10, 1e18], device=DEVICE)
    for eps in (1e-8, 1e-30):
        given = ([torch.ones_like(values)], [values.clone()], *([torch.zeros_like(values)],) * 2)
        given = (*copied(given), [scalar(0.0)])
        exact = copied(given, torch.float64)
        adamw_step(*given, **{**KNOBS, "eps": eps}, backend="triton")
        adamw_step(*exact, **{**KNOBS, "eps": eps}, backend="reference")
        torch.testing.assert_close(
            given[0][0].double()[[0, 3, 4, 5, 6]], exact[0][0][[0, 3, 4, 5, 6]]
        )
        assert given[0][0].isfinite().all()


@runs
@pytest.mark.parametrize("single", [True, False])
def test_places_that_are_not_aligned(single):
    """Slices of something flat, as partitions are; what lies around stays."""
    around = [draw([400], seed, positive=seed == 3)[0] for seed in range(4)]
    before = [z.clone() for z in around]
    cuts = [(3, 200)] if single else [(3, 200), (201, 390)]
    given = [[z[a:b] for a, b in cuts] for z in around]
    steps = [scalar(0.0) for _ in cuts]
    exact = [*copied(given, torch.float64), [z.double() for z in steps]]
    adamw_step(*given, steps, **KNOBS, backend="triton", config=SMALL)
    adamw_step(*exact, **KNOBS, backend="reference")
    close(given, exact[:4])
    for new, old in zip(around, before):
        assert torch.equal(new[:3], old[:3])
        assert torch.equal(new[390:], old[390:])


@runs
@pytest.mark.parametrize("sizes", LISTS, ids=str)
def test_sum_of_squares(sizes):
    tensors = draw(sizes, 5)
    expected = sum_of_squares(tensors, backend="reference")
    for config in (SMALL, None):
        got, again = (sum_of_squares(tensors, backend="triton", config=config) for _ in range(2))
        assert got.dtype == torch.float64
        assert torch.equal(got, again)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    tensors[-1].view(-1)[-1] = torch.inf
    assert sum_of_squares(tensors, backend="triton").isinf()
    tensors[0].view(-1)[0] = torch.nan
    assert sum_of_squares(tensors, backend="triton").isnan()


@runs
def test_tables():
    tensors = draw([5, 0, 130], 0)
    found = tensor_lists.table((tensors, tensors), 64)
    assert (found.width, found.blocks) == (4, 4)
    rows = found.entries.tolist()
    assert rows[2] == [5, 0, 130, 0]
    assert rows[3] == [0, 1, 1, 2**62]


@runs
def test_operators_are_registered_soundly():
    p, g, m, v, steps = state([5, 9])
    arguments = (p, g, m, v, steps, [], None, scalar(0.0), 1e-2, 1e-3, 0.9, 0.95, 1e-8, [64, 4])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.llmtrain.adamw_step, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.llmtrain.sum_of_squares, (g, [64, 4]), test_utils=checks)


@runs
def test_compiles_as_one_graph():
    def step(p, g, m, v, steps):
        total = sum_of_squares(g, backend="triton", config=SMALL)
        scale = total.sqrt().clamp(min=1.0).float()
        adamw_step(p, g, m, v, steps, **KNOBS, grad_scale=scale, backend="triton", config=SMALL)
        return total

    one, two = state([70, 9]), state([70, 9])
    first = step(*one)
    second = torch.compile(step, fullgraph=True, backend="aot_eager")(*two)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("sizes", [[10_000_019], [3_000_000, 7, 2048 * 2048]], ids=str)
def test_on_a_gpu(sizes):
    """As near to float64 as torch's fused step, and the same bits twice."""
    options = {**KNOBS, "grad_scale": scalar(1.7), "found_inf": scalar(0.0)}
    given, again, plain = state(sizes), state(sizes), state(sizes)
    exact = copied(given, torch.float64)
    adamw_step(*given, **options, backend="triton")
    adamw_step(*again, **options, backend="triton")
    adamw_step(*plain, **options, backend="torch")
    adamw_step(*exact, **options, backend="reference")
    for kind in (0, 2, 3):
        for mine, twice, theirs, truth in zip(given[kind], again[kind], plain[kind], exact[kind]):
            assert torch.equal(mine, twice)
            errors = [(z.double() - truth).norm() / truth.norm() for z in (mine, theirs)]
            assert errors[0] <= 1.1 * errors[1] + 2e-8


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("sizes", [[1_000_003], [1000, 70_000]], ids=str)
def test_in_a_cuda_graph(sizes):
    one, two = state(sizes), state(sizes)
    skip = scalar(0.0)

    def step(lists):
        scale = sum_of_squares(lists[1]).sqrt().float()
        adamw_step(*lists, **KNOBS, grad_scale=scale, found_inf=skip, backend="triton")

    for _ in range(3):
        step(one)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(two)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(two)
    for _ in range(2):
        graph.replay()
    skip.fill_(1.0)
    graph.replay()
    torch.testing.assert_close(one, two, rtol=0, atol=0)


OPTIONS = {
    "LOG_BETA1": log(0.9),
    "LOG_BETA2": log(0.95),
    "NEW1": 0.1,
    "NEW2": 0.05,
    "EPS": 1e-8,
    "SCALED": True,
    "SKIPS": True,
}


@hosts
@pytest.mark.parametrize("device", TABLES)
@pytest.mark.parametrize("copy", [False, True])
def test_compiled_for_hopper(device, copy):
    """16 bytes a load and a store, no spills, flat and by table; two programs of 256 threads and
    more fit a processor, each with 64 bytes a thread on the way."""
    from llmtrain_kernels.adamw.kernels import (
        adamw_flat_kernel,
        adamw_list_kernel,
        squares_flat_kernel,
        squares_list_kernel,
    )

    shared = {"lr": "fp32", "decay": "fp32", "size": "i64"}
    pointers = defaultdict(lambda: "*fp32", p_copy="*bf16", p_table="*i64", **shared)
    for entry in tables(device)["adamw"]:
        own = {"COPY": copy, "BLOCK": entry["BLOCK"]}
        wide = entry["BLOCK"] // entry["num_warps"] // 32 // 4  # loads of 16 bytes a thread
        for kernel, constants in (
            (adamw_flat_kernel, OPTIONS | own),
            (adamw_list_kernel, OPTIONS | own | {"ALIGNED": True, "WIDTH": 256}),
        ):
            facts = compile_for_hopper(
                kernel, pointers, constants, num_warps=entry["num_warps"], divisible=("size",)
            )
            assert facts.spilled == 0
            assert facts.registers <= 96
            assert facts.ptx.count(".v4.b32") >= 7 * wide
    for entry in tables(device)["sum_of_squares"]:
        wide = entry["BLOCK"] // entry["num_warps"] // 32 // 4
        own = {"BLOCK": entry["BLOCK"]}
        for kernel, constants in (
            (squares_flat_kernel, own),
            (squares_list_kernel, own | {"ALIGNED": True, "WIDTH": 256}),
        ):
            facts = compile_for_hopper(
                kernel, pointers, constants, num_warps=entry["num_warps"], divisible=("size",)
            )
            assert facts.spilled == 0
            assert facts.ptx.count(".v4.b32") >= wide
