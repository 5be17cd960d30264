"""Muon's Triton kernels: in Triton's interpreter, compiled for a GPU that is not there, on one."""

from collections import defaultdict

import pytest
import torch
from llmtrain_kernels.launch import tables
from llmtrain_kernels.muon import (
    apply_updates,
    momentum_step,
    newton_schulz,
    one_by_one,
    op,
    symmetric_matmul,
)
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

SMALL = {"BLOCK": 64, "num_warps": 4}
TILES = {"B": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
WIDE = TILES | {"BN": 32}
LISTS = [[1], [64, 144], [5, 0, 130, 64, 3]]
FLOAT32 = pytest.mark.skipif(not INTERPRETED, reason="on a GPU symmetric_matmul is of 16-bit tiles")
BITS = 2**-7 if INTERPRETED else 2**-8  # of bfloat16; the interpreter cuts off instead of rounding


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def lists(sizes, *seeds):
    return [[draw(n, seed=seed) for n in sizes] for seed in seeds]


def scalar(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=20)


@runs
@pytest.mark.parametrize("sizes", LISTS, ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.95, 0.0])
def test_momentum_is_the_reference_in_float64(sizes, nesterov, momentum):
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, BITS)):
        g, m = lists(sizes, 0, 1)
        exact = [[z.double() for z in some] for some in (g, m)]
        options = {"momentum": momentum, "nesterov": nesterov, "grad_scale": scalar(3.0)}
        options["found_inf"] = scalar(0.0)
        got = momentum_step(g, m, dtype=dtype, backend="triton", config=SMALL, **options)
        expected = momentum_step(*exact, dtype=torch.float64, backend="reference", **options)
        for a, b, c, d in zip(m, exact[1], got, expected):
            torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=3e-7)
            assert c.dtype == dtype
            torch.testing.assert_close(c.double(), d, rtol=tolerance, atol=3e-7)


@runs
@pytest.mark.parametrize("sizes", LISTS, ids=str)
def test_apply_is_the_reference_in_float64(sizes):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p, u = lists(sizes, 0, 1)
        u = [z.to(dtype) for z in u]
        exact = [[z.double() for z in some] for some in (p, u)]
        options = {"rate": 0.3, "decay": 0.01, "found_inf": scalar(0.0)}
        apply_updates(p, u, backend="triton", config=SMALL, **options)
        apply_updates(*exact, backend="reference", **options)
        for a, b in zip(p, exact[0]):
            torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=3e-7)


@runs
def test_a_skipped_step_changes_nothing():
    g, m = lists([64, 9], 0, 1)
    g[0][:] = torch.nan
    before = [z.clone() for z in m]
    options = {"momentum": 0.9, "nesterov": True, "grad_scale": scalar(torch.nan)}
    options |= {"found_inf": scalar(1.0), "backend": "triton", "config": SMALL}
    for dtype in (torch.float32, torch.bfloat16):
        got = momentum_step(g, m, dtype=dtype, **options)
        assert not any(u.any() for u in got)
        torch.testing.assert_close(m, before, rtol=0, atol=0)
    apply_updates(m, got, rate=1.0, decay=0.5, found_inf=scalar(1.0), backend="triton")
    torch.testing.assert_close(m, before, rtol=0, atol=0)


@runs
@FLOAT32
@pytest.mark.parametrize("tiles", [TILES, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (1, 5), (17, 16), (33, 70), (96, 16)])
def test_symmetric_matmul_is_the_reference_in_float64(rows, cols, turned, tiles):
    """Whole and ragged tiles, transposed views, one row; nothing beyond the output is written."""
    tile = torch.arange(rows, device=DEVICE) // tiles["BN"]
    apart = tile[:, None] != tile[None, :]  # elsewhere the sums of a CPU's BLAS may differ in order
    x = draw(2, cols, rows).mT if turned else draw(2, rows, cols)
    expected = symmetric_matmul(x.double(), backend="reference")
    gram = symmetric_matmul(x, backend="triton", config=tiles)
    torch.testing.assert_close(gram.double(), expected, rtol=2e-6, atol=2e-5)
    assert torch.equal(gram[:, apart], gram.mT[:, apart])
    options = {"add_NRR": gram, "alpha": 0.3, "beta": -2.0, "diagonal": 50.0}
    expected = symmetric_matmul(gram.double(), **options | {"add_NRR": gram.double()})
    got = symmetric_matmul(gram, **options, backend="triton", config=tiles)
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 * scale)
    assert torch.equal(got[:, apart], got.mT[:, apart])


@runs
@FLOAT32
@pytest.mark.parametrize("tiles", [TILES, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (5, 3), (17, 17), (96, 48), (33, 16)])
def test_symmetric_matmul_of_two_factors(rows, cols, turned, tiles):
    """Of polynomials of one matrix the product; of any others a tile and its image, both as below
    the diagonal."""
    shape = (2, cols, rows) if turned else (2, rows, cols)
    x, other = (draw(*shape, seed=seed) for seed in (0, 1))
    x, other = (x.mT, other.mT) if turned else (x, other)
    options = {"backend": "triton", "config": tiles}
    product = x.double() @ other.double().mT
    tile = torch.arange(rows, device=DEVICE) // tiles["BN"]
    expected = torch.where(tile[:, None] >= tile[None, :], product, product.mT)
    got = symmetric_matmul(x, other, **options)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
    gram = symmetric_matmul(x, **options)
    squared = symmetric_matmul(gram, diagonal=1.0, **options)
    got = symmetric_matmul(squared, gram.mT.contiguous().mT, **options)
    expected = squared.double() @ gram.double()
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6 * scale)


@runs
@FLOAT32
@pytest.mark.parametrize(("rows", "cols"), [(20, 40), (40, 20), (33, 33)])
def test_iteration_is_the_definition_in_float64(rows, cols):
    x = draw(2, rows, cols)
    expected = one_by_one(x.double(), 5)
    got = newton_schulz(x, 5, backend="triton")
    torch.testing.assert_close(
        got.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )


@runs
@FLOAT32
def test_symmetric_matmul_of_extreme_values():
    x = draw(1, 20, 20) * torch.tensor([1e-18, 1.0, 1e17, 0.0], device=DEVICE).repeat(5)[:, None]
    expected = symmetric_matmul(x.double(), backend="reference")
    got = symmetric_matmul(x, backend="triton", config=TILES).double()
    size = x.double().norm(dim=2)
    assert ((got - expected).abs() <= 1e-6 * size[:, :, None] * size[:, None] + 1e-38).all()


@hosts
def test_more_rows_than_offsets_reach(monkeypatch):
    monkeypatch.setattr(op.triton_backend, "unavailable", lambda device, *dtypes: None)
    known = ("symmetric_matmul", "triton", "cuda", torch.bfloat16)
    assert op.select_product(*known, op.MOST_ROWS) == "triton"
    with pytest.raises(ValueError, match=r"they take 46340 rows at most, not 46341; set backend"):
        op.select_product(*known, op.MOST_ROWS + 1)
    assert op.select_product(known[0], "auto", *known[2:], op.MOST_ROWS + 1) == "reference"


@runs
def test_operators_are_registered_soundly():
    g, m = lists([5, 9], 0, 1)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    operators = torch.ops.llmtrain
    u = [torch.zeros_like(z, dtype=torch.bfloat16) for z in m]
    arguments = (g, m, u, None, scalar(0.0), 0.9, True, [64, 4])
    torch.library.opcheck(operators.muon_momentum_step, arguments, **checks)
    torch.library.opcheck(operators.muon_apply_updates, (m, g, None, 0.1, 0.1, [64, 4]), **checks)
    x = draw(2, 5, 9)
    for other in (None, x + 1):
        arguments = (x, other, None, 1.0, 1.0, 0.5, [16, 32, 16, 4, 2])
        torch.library.opcheck(operators.symmetric_matmul, arguments, **checks)


@runs
def test_compiles_as_one_graph():
    def step(g, m, x):
        u = momentum_step(
            g, m, momentum=0.9, nesterov=True, dtype=torch.float32, backend="triton", config=SMALL
        )
        apply_updates(m, u, rate=0.1, decay=0.1, backend="triton", config=SMALL)
        return symmetric_matmul(x, backend="triton", config=TILES)

    one, two = (lists([70, 9], 0, 1) for _ in range(2))
    x = draw(1, 5, 9, dtype=torch.float32 if INTERPRETED else torch.bfloat16)
    first = step(*one, x)
    second = torch.compile(step, fullgraph=True, backend="aot_eager")(*two, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(2048, 5632), (1024, 2048), (200, 333)])
def test_symmetric_matmul_on_a_gpu(rows, cols, turned):
    """As near to float64 as cuBLAS, symmetric, the same bits twice, and in a CUDA graph."""
    shape = (2, cols, rows) if turned else (2, rows, cols)
    x = draw(*shape, dtype=torch.bfloat16)
    x = x.mT if turned else x
    gram, again = symmetric_matmul(x), symmetric_matmul(x)
    plain = symmetric_matmul(x, backend="reference")
    exact = symmetric_matmul(x.double(), backend="reference")
    errors = [(z.double() - exact).norm() / exact.norm() for z in (gram, plain)]
    assert errors[0] <= 1.1 * errors[1]
    assert torch.equal(gram, again)
    assert torch.equal(gram, gram.mT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = symmetric_matmul(x)
    graph.replay()
    assert torch.equal(gram, replayed)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize(("rows", "cols"), [(2048, 5632), (5632, 2048), (2048, 2048), (200, 333)])
def test_iteration_on_a_gpu(rows, cols):
    """In float16 nearer to float64 than the definition in bfloat16, the same bits twice."""
    x = draw(2, rows, cols) * torch.arange(1.0, cols + 1, device=DEVICE).rsqrt()
    x = x.bfloat16()
    got, again = (newton_schulz(x, 5, dtype=torch.float16) for _ in range(2))
    assert torch.equal(got, again)
    expected, plain = one_by_one(x.double(), 5), one_by_one(x, 5)
    errors = [(z.double() - expected).norm() / expected.norm() for z in (got, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.gpu
@hosts
def test_passes_in_a_cuda_graph():
    """Captured and replayed as called, after what the host had in memory is gone."""
    one, two = (lists([70_000, 9], 0, 1) for _ in range(2))
    options = {"momentum": 0.9, "nesterov": True, "dtype": torch.bfloat16}

    def step(g, m):
        apply_updates(g, momentum_step(g, m, **options), rate=0.1, decay=0.1)

    for _ in range(3):
        step(*one)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*two)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*two)
    junk = [torch.ones(100, dtype=torch.int64, pin_memory=True) for _ in range(100)]
    for _ in range(2):
        graph.replay()
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert junk


@hosts
@pytest.mark.parametrize("device", TABLES)
def test_lists_compiled_for_hopper(device):
    from llmtrain_kernels.muon.kernels import KINDS, apply_kernel, momentum_kernel

    types = defaultdict(lambda: "*fp32", p_table="*i64", rate="fp32", decay="fp32")
    shared = {"SKIPS": True, "KIND": KINDS[torch.bfloat16], "ALIGNED": True, "WIDTH": 256}
    momentum = {"NEW": 0.05, "NESTEROV": True, "SCALED": True}
    kernels = (("muon_momentum", momentum_kernel, momentum, 3), ("muon_apply", apply_kernel, {}, 2))
    for name, kernel, own, wide in kernels:
        for entry in tables(device)[name]:
            constants = {**shared, **own, "BLOCK": entry["BLOCK"]}
            facts = compile_for_hopper(kernel, types, constants, num_warps=entry["num_warps"])
            assert facts.spilled == 0
            assert facts.registers <= 128
            a_thread = entry["BLOCK"] // entry["num_warps"] // 32 // 4
            assert facts.ptx.count(".v4.b32") >= wide * a_thread


@hosts
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("inner", ["r", "c"])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("device", TABLES)
def test_symmetric_matmul_compiled_for_hopper(device, even, inner, last):
    """Tensor cores by warp groups from shared memory, for rows and for columns in order."""
    from llmtrain_kernels.muon.kernels import symmetric_matmul_kernel

    integers = dict.fromkeys(("R", "C", "s_n", "s_r", "s_c", "s_on", "s_or", "s_oc"), "i32")
    scalars = dict.fromkeys(("alpha", "beta", "diagonal"), "fp32")
    types = defaultdict(lambda: "*fp16", **scalars, **integers)
    wide = {"B": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3}
    for entry in (*tables(device)["symmetric_matmul"], wide):
        facts = compile_for_hopper(
            symmetric_matmul_kernel,
            types,
            {"ADD": last, "DIAGONAL": last, "EVEN": even, "PRECISION": "tf32"}
            | {f"s_{inner}": 1, f"s_o{inner}": 1}
            | {key: entry[key] for key in ("B", "BN", "BK")},
            num_warps=entry["num_warps"],
            num_stages=entry["num_stages"],
            divisible=tuple(integers),
        )
        assert facts.wgmma > 0
        assert facts.spilled == 0
        assert facts.shared <= 227 * 1024
        assert facts.registers * entry["num_warps"] * 32 <= 65536
