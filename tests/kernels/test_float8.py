"""Float8 products against float64: scales, rounding, gradients, and the real products on a CPU."""

import pytest
import torch
from llmtrain_kernels.float8 import (
    E4M3,
    E5M2,
    SCALINGS,
    cost,
    float8_linear,
    quantise,
    quantise_weight,
    unavailable,
)

N, D, F = 48, 64, 32


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def dequantised(x, dtype, scaling):
    made = quantise(x, dtype, scaling)
    return made.values.double() * made.inverse.double()


def results(x, w, dy, **options):
    x, w = (z.detach().clone().requires_grad_() for z in (x, w))
    y = float8_linear(x, w, **options)
    return y, *torch.autograd.grad(y, (x, w), dy)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("dtype", "half_step"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_rounding_is_within_half_a_step(scaling, dtype, half_step):
    x = draw(N, D, scale=3e-5) * torch.logspace(0, -2, N, dtype=torch.float64)[:, None]
    back = dequantised(x, dtype, scaling)
    amax = x.abs().max() if scaling == "tensorwise" else x.abs().amax(1, keepdim=True)
    normal = x.abs() > amax * (torch.finfo(dtype).tiny / torch.finfo(dtype).max)
    assert normal.float().mean() > 0.9
    assert ((back - x).abs() <= half_step * x.abs() * 1.001)[normal].all()
    largest = x.abs() == amax
    torch.testing.assert_close(back[largest], x[largest], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_infinities_and_large_values(scaling):
    made = quantise(torch.zeros(16, 16), E4M3, scaling)
    assert (made.values.float() == 0).all()
    assert made.inverse.isfinite().all()
    huge = torch.full((16, 16), 3e38)
    back = dequantised(huge, E4M3, scaling)
    torch.testing.assert_close(back, huge.double(), rtol=1e-5, atol=0)
    wrong = torch.ones(16, 16)
    wrong[3, 5] = float("inf")
    assert not dequantised(wrong, E4M3, scaling).isfinite().all()  # the guard sees it


@pytest.mark.parametrize("scaling", SCALINGS)
def test_emulation_is_the_algebra(scaling):
    """y, dx and dW are products of the rounded factors, each along what it sums over."""
    x, w, dy = draw(N, D), draw(F, D, seed=1, scale=0.02), draw(N, F, seed=2, scale=1e-6)
    y, dx, dw = results(x, w, dy, scaling=scaling, backend="emulated")
    x8, w8 = dequantised(x, E4M3, scaling), dequantised(w, E4M3, scaling)
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(y, x8 @ w8.t(), **exact)
    dy8 = dequantised(dy, E5M2, scaling)
    w8_DF = dequantised(w.t(), E4M3, scaling)
    torch.testing.assert_close(dx, dy8 @ w8_DF.t(), rtol=1e-10, atol=1e-18)
    dy8_FN, x8_DN = dequantised(dy.t(), E5M2, scaling), dequantised(x.t(), E4M3, scaling)
    torch.testing.assert_close(dw, dy8_FN @ x8_DN.t(), rtol=1e-10, atol=1e-18)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backend", ["scaled_mm", "emulated"])
def test_near_float64(scaling, backend):
    x, w, dy = draw(N, D), draw(F, D, seed=1, scale=0.02), draw(N, F, seed=2, scale=1e-6)
    got = results(x.bfloat16(), w.float(), dy.bfloat16(), scaling=scaling, backend=backend)
    wanted = (x @ w.t(), dy @ w, dy.t() @ x)
    assert [z.dtype for z in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, true, limit in zip(got, wanted, (0.05, 0.08, 0.08)):
        assert ((ours.double() - true).norm() / true.norm()).item() < limit


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_the_emulated_ones(scaling):
    x, w, dy = draw(N, D).bfloat16(), draw(F, D, seed=1).float(), draw(N, F, seed=2).bfloat16()
    pairs = zip(*(results(x, w, dy, scaling=scaling, backend=b) for b in ("scaled_mm", "emulated")))
    for real, emulated in pairs:
        torch.testing.assert_close(real, emulated, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_weight_quantised_before_gives_the_same_bits(scaling):
    x, w, dy = draw(3, 16, D).bfloat16(), draw(F, D, seed=1).float(), draw(3, 16, F).bfloat16()
    made = quantise_weight(w, scaling)
    assert all(part.values.is_contiguous() for part in made)
    pairs = zip(
        results(x, w, dy, scaling=scaling),
        results(x, w, dy, scaling=scaling, quantised=made),
    )
    for direct, before in pairs:
        assert torch.equal(direct, before)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_graph(scaling):
    x, w, dy = draw(N, D).bfloat16(), draw(F, D, seed=1).float(), draw(N, F).bfloat16()
    x, w = x.requires_grad_(), w.requires_grad_()
    made = quantise_weight(w.detach(), scaling)
    compiled = torch.compile(float8_linear, backend="aot_eager", fullgraph=True)
    for options in ({}, {"quantised": made}):
        wanted = results(x, w, dy, scaling=scaling, **options)
        y = compiled(x, w, scaling=scaling, **options)
        got = (y, *torch.autograd.grad(y, (x, w), dy))
        for ours, theirs in zip(got, wanted):
            assert torch.equal(ours, theirs)


def test_what_it_keeps_is_what_cost_says():
    x, w = draw(N, D).bfloat16().requires_grad_(), draw(F, D).float().requires_grad_()
    made = quantise_weight(w.detach(), "tensorwise")
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        float8_linear(x, w, quantised=made)
    weights = {part.values.data_ptr() for part in made}
    saved = sum(z.nbytes for z in kept if z.dim() and z.data_ptr() not in weights)
    forward, backward = cost(N, D, F)
    assert saved == forward.saved_bytes
    assert forward.flops == 2 * N * D * F == backward.flops / 2


def test_sizes_and_devices():
    with pytest.raises(AssertionError):
        float8_linear(draw(N, 60), draw(F, 60))
    with pytest.raises(AssertionError):
        float8_linear(draw(47, D), draw(F, D))
    assert unavailable(torch.device("cpu")) == "cpu has no float8 products"


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_on_a_gpu(scaling):
    device = torch.device("cuda")
    if unavailable(device):
        pytest.skip(unavailable(device))
    x, w, dy = draw(256, 512), draw(1024, 512, seed=1, scale=0.02), draw(256, 1024, seed=2)
    x, w, dy = x.bfloat16().to(device), w.float().to(device), dy.bfloat16().to(device)
    real = results(x, w, dy, scaling=scaling)
    emulated = results(x, w, dy, scaling=scaling, backend="emulated")
    for ours, theirs in zip(real, emulated):
        assert ((ours - theirs).double().norm() / theirs.double().norm()).item() < 0.01
