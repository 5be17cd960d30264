"""The Triton kernel that rounds to float8 in both layouts: interpreted, compiled, on a GPU."""

import pytest
import torch
from llmtrain_kernels.float8 import E4M3, E5M2, both_layouts, float8_linear, quantise
from llmtrain_kernels.float8.quantise import cast_both, launch_cast, quantise_weight
from llmtrain_kernels.launch import tables
from offline import DEVICE, TABLES, TYPES, compile_for_hopper, hosts, run_in_interpreter, runs

pytest.importorskip("triton")

SHAPES = [(1, 1), (16, 48), (100, 70), (5, 300)]
TILES = [{"rows": 16, "columns": 32, "num_warps": 4}, {"rows": 64, "columns": 16, "num_warps": 4}]


def draw(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def cast(x, dtype, config=None):
    """Rows and columns by the kernel, with the amax that torch finds."""
    amax = x.float().abs().max().clamp(min=1e-12)
    rows, columns = (
        torch.full(shape, 1.0, device=DEVICE).to(dtype) for shape in (x.shape, x.shape[::-1])
    )
    launch_cast(x, amax, rows, columns, config)
    return rows, columns


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=12)


@runs
@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_float8_has_is_kept_in_both_layouts(shape, dtype, config):
    """Numbers of float8, half their size, with the largest among them: scaled, they are exact."""
    largest = torch.finfo(dtype).max
    x = (draw(*shape, dtype=torch.float32) * largest / 8).clamp(-largest, largest)
    x = x.to(dtype).float()
    x.view(-1)[-1] = -largest
    for given in (torch.float32, torch.bfloat16):
        rows, columns = cast((x / 2).to(given), dtype, config)
        assert torch.equal(rows.float(), x)
        assert torch.equal(columns.float(), x.t())


@pytest.mark.gpu
@hosts  # the interpreter loses a carry from the fraction to the exponent
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounds_as_the_reference(dtype):
    x = draw(300, 700, dtype=torch.float32)
    expected = quantise(x, dtype, "tensorwise").values.float()
    got = cast(x, dtype)[0].float()
    # between two numbers, a rounding of the scale may decide
    step = 2**-3 if dtype == E4M3 else 2**-2
    assert ((got - expected).abs() <= step * expected.abs() + 2**-9).all()
    assert (got == expected).float().mean() >= 0.999


@runs
def test_zeros():
    rows, columns = cast(torch.zeros(20, 20, device=DEVICE), E4M3, TILES[0])
    assert not rows.float().any()
    assert not columns.float().any()


@pytest.mark.gpu
@hosts  # the interpreter's float8 has none
def test_what_is_no_number_stays_so():
    x = draw(20, 20, dtype=torch.float32)
    x[3, 5] = torch.nan
    amax = x.nan_to_num().abs().max()
    rows, columns = (torch.zeros(20, 20, device=DEVICE).to(E4M3) for _ in range(2))
    launch_cast(x, amax, rows, columns, TILES[0])
    assert rows.float().isnan().nonzero().tolist() == [[3, 5]]
    assert columns.float().isnan().nonzero().tolist() == [[5, 3]]


@hosts
@pytest.mark.parametrize("device", TABLES)
@pytest.mark.parametrize(("given", "made"), [("bfloat16", "fp8e4nv"), ("float32", "fp8e5")])
def test_registers_suffice(device, given, made):
    from llmtrain_kernels.float8.kernels import cast_both_kernel

    types = {"p_x": TYPES[given], "p_amax": "*fp32", "p_rows": f"*{made}", "p_columns": f"*{made}"}
    types |= {"M": "i32", "K": "i32", "largest": "fp32"}
    for entry in tables(device)["float8_cast"]:
        facts = compile_for_hopper(
            cast_both_kernel,
            types,
            {"ROWS": entry["rows"], "COLUMNS": entry["columns"]},
            num_warps=entry["num_warps"],
            divisible=("M", "K"),
        )
        assert facts.spilled == 0
        assert facts.registers <= 128
        assert "ld.global.v4.b32" in facts.ptx  # 16 bytes a load; stores of whole sectors
        assert "st.global.v4.b32" in facts.ptx or "st.global.v2.b32" in facts.ptx


@hosts
def test_operator_is_registered_soundly():
    fake = torch.empty(6, 4, device="meta")
    rows, columns = cast_both(fake, fake.new_empty(()), E4M3)
    assert (rows.shape, columns.shape, rows.dtype) == ((6, 4), (4, 6), E4M3)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("shape", [(4096, 2048), (1000, 336)])
def test_on_a_gpu(shape):
    """Both layouts and their scale as the reference's; a weight anew in its old memory; one graph
    with the layer, and gradients near float64's."""
    torch._dynamo.reset()
    for dtype in (E4M3, E5M2):
        x = draw(*shape)
        mine, plain = (both_layouts(x, dtype, "tensorwise", fused=fused) for fused in (True, False))
        for ours, theirs in zip(mine, plain, strict=True):
            torch.testing.assert_close(ours.inverse, theirs.inverse, rtol=1e-6, atol=0)
            same = ours.values.float() == theirs.values.float()
            assert same.float().mean() >= 0.999
    weight = draw(512, shape[1], dtype=torch.float32, seed=1)
    made = quantise_weight(torch.ones_like(weight), "tensorwise")
    places = [z.data_ptr() for part in made for z in part]
    again = quantise_weight(weight, "tensorwise", out=made)
    fresh = quantise_weight(weight, "tensorwise")
    assert [z.data_ptr() for part in again for z in part] == places
    for old, new in zip(again, fresh, strict=True):
        assert torch.equal(old.values.float(), new.values.float())
        assert torch.equal(old.inverse, new.inverse)
    x, weight = (z.detach()[: shape[0] // 16 * 16].requires_grad_() for z in (x, weight))
    dy = draw(x.shape[0], 512, seed=2)
    results = []
    for call in (float8_linear, torch.compile(float8_linear, fullgraph=True)):
        y = call(x, weight, quantised=fresh)
        results.append([y, *torch.autograd.grad(y, (x, weight), dy)])
    exact = (
        x.double() @ weight.double().t(),
        dy.double() @ weight.double(),
        dy.double().t() @ x.double(),
    )
    for eager, compiled, true in zip(*results, exact, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-2, atol=1e-2 * true.abs().max().item())
        assert ((eager.double() - true).norm() / true.norm()).item() < 0.08
