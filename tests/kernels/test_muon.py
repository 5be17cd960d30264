"""Muon's element-wise parts and x x^T by halves: definitions, choices, errors, costs."""

import pytest
import torch
from llmtrain_kernels.muon import (
    COEFFICIENTS,
    apply_updates,
    cost,
    iteration_cost,
    momentum_step,
    newton_schulz,
    one_by_one,
    symmetric_cost,
    symmetric_matmul,
)
from torch.utils.flop_counter import FlopCounterMode

SIZES = [(3, 4), (1,), (20,)]


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SIZES
    ]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_momentum(backend, nesterov):
    g, m = draw(0), draw(1)
    expected = [0.9 * a + 0.1 * b / 4 for a, b in zip(m, g)]
    options = {"momentum": 0.9, "nesterov": nesterov, "backend": backend}
    scale, applied = torch.tensor(4.0), torch.tensor(0.0)
    got = momentum_step(g, m, grad_scale=scale, found_inf=applied, dtype=torch.float32, **options)
    torch.testing.assert_close(m, expected)
    after = [0.9 * a + 0.1 * b / 4 for a, b in zip(m, g)] if nesterov else expected
    assert all(u.dtype == torch.float32 for u in got)
    torch.testing.assert_close(got, [z.float() for z in after])
    g[0][:] = torch.nan
    got = momentum_step(g, m, found_inf=torch.tensor(1.0), dtype=torch.float64, **options)
    torch.testing.assert_close(m, expected)
    assert not any(u.any() for u in got)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_apply(backend):
    p, u = draw(0), draw(1)
    expected = [0.99 * a - 0.5 * b for a, b in zip(p, u)]
    options = {"rate": 0.5, "decay": 0.01, "backend": backend}
    apply_updates(p, u, **options)
    torch.testing.assert_close(p, expected)
    zeros = [torch.zeros_like(z) for z in u]
    apply_updates(p, zeros, found_inf=torch.tensor(1.0), **options)
    torch.testing.assert_close(p, expected)
    apply_updates([], [], **options)


@pytest.mark.parametrize("turned", [False, True])
def test_symmetric_matmul(turned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    x = x.mT if turned else x
    gram = symmetric_matmul(x)
    torch.testing.assert_close(gram, torch.einsum("nrc,nsc->nrs", x, x))
    got = symmetric_matmul(gram, add_NRR=gram, alpha=0.3, beta=-2.0)
    torch.testing.assert_close(got, 0.3 * gram @ gram - 2 * gram)
    torch.testing.assert_close(symmetric_matmul(x, alpha=3.0), 3 * gram)
    torch.testing.assert_close(symmetric_matmul(gram, got), gram @ got)
    unit = torch.eye(gram.shape[1], dtype=gram.dtype)
    got = symmetric_matmul(x, diagonal=0.7, alpha=2.0)
    torch.testing.assert_close(got, 2 * gram + 0.7 * unit)


@pytest.mark.parametrize(("rows", "cols"), [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_iteration_is_a_polynomial_of_singular_values(rows, cols):
    """Of each matrix, tall or wide; zero stays zero."""
    generator = torch.Generator().manual_seed(0)
    x_NRC = torch.randn(3, rows, cols, generator=generator, dtype=torch.float64)
    x_NRC[2] = 0
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(x_NRC, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None]) @ vt
    for got in (newton_schulz(x_NRC, 5), one_by_one(x_NRC, 5)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    assert not newton_schulz(x_NRC[2:].bfloat16(), 5).any()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 10])
def test_groups_of_steps_are_the_definition(steps):
    x_NRC = torch.randn(2, 9, 14, generator=torch.Generator().manual_seed(steps)).double()
    expected = one_by_one(x_NRC, steps)
    torch.testing.assert_close(newton_schulz(x_NRC, steps), expected, rtol=1e-8, atol=1e-10)


def with_spectrum(rows, cols, exponent):
    """Singular values from 1 down to 10^-exponent, evenly in their logarithms."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, rows), (cols, rows))
    u, v = (
        torch.linalg.qr(torch.randn(s, generator=generator, dtype=torch.float64))[0] for s in shapes
    )
    return ((u * torch.logspace(0, -exponent, rows, dtype=torch.float64)) @ v.mT).bfloat16()


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("turned", [False, True])
def test_float16_is_nearer_to_float64_than_the_definition_in_bfloat16(exponent, turned):
    """However many directions the matrix has: what is taken from one Gram matrix holds."""
    x_RC = with_spectrum(160, 352, exponent)
    x_NRC = (x_RC.mT.contiguous() if turned else x_RC)[None]
    expected = one_by_one(x_NRC.double(), 5)
    got, plain = newton_schulz(x_NRC, 5, dtype=torch.float16), one_by_one(x_NRC, 5)
    assert got.dtype == torch.float16
    errors = [(z.double() - expected).norm() / expected.norm() for z in (got, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_cost_of_the_iteration():
    x_NRC = torch.randn(2, 16, 48)
    for matrices in (x_NRC, x_NRC.mT.contiguous()):
        n, rows, cols = matrices.shape
        with FlopCounterMode(display=False) as counter:
            newton_schulz(matrices, 3, backend="reference")
        found = iteration_cost(n, rows, cols, 3, itemsize=4)
        halves = 2 * 16 * 48 + 9 * 2 * 16 * 16  # what symmetric products are, whole, by 16 rows
        saved = n * 16 * halves * (1 - (16 + 1) / (2 * 16))
        assert found.flops == counter.get_total_flops() - saved
        assert found.bytes_read == found.bytes_written == matrices.nbytes


def test_errors():
    g, m = draw(0), draw(1)
    known = {"momentum": 0.9, "nesterov": True, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"momentum_step: got 2 gradients for 3 momenta"):
        momentum_step(g[:2], m, **known)
    with pytest.raises(ValueError, match=r"apply_updates: got 3 updates for 2 parameters"):
        apply_updates(m[:2], g, rate=1.0, decay=0.0)
    with pytest.raises(ValueError, match=r"momentum_step: got backend='triton', .*not cpu"):
        momentum_step(g, m, backend="triton", **known)
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"got add \(2, 4, 4\) for x \(2, 3, 4\)"):
        symmetric_matmul(x, add_NRR=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"got other \(2, 4, 3\) .* expected both alike"):
        symmetric_matmul(x, x.mT)
    with pytest.raises(ValueError, match=r"symmetric_matmul: got backend='triton', .*not cpu"):
        symmetric_matmul(x, backend="triton")
    with pytest.raises(ValueError, match=r"expected auto or one of triton, reference"):
        symmetric_matmul(x, backend="cublas")


def test_costs():
    x = torch.ones(2, 5, 7)
    with FlopCounterMode(display=False) as counter:
        y = symmetric_matmul(x, backend="reference")
    found = symmetric_cost(2, 5, 7, itemsize=4)
    whole = counter.get_total_flops()
    assert found.flops == whole * (5 + 1) / (2 * 5)  # the diagonal and half of the rest
    assert (found.bytes_read, found.bytes_written) == (x.nbytes, y.nbytes)
    assert symmetric_cost(2, 5, 7, itemsize=4, add=True).bytes_read == x.nbytes + y.nbytes
    assert symmetric_cost(2, 5, 7, itemsize=4, other=True).bytes_read == 2 * x.nbytes
    p, u = torch.ones(9), torch.ones(9).bfloat16()
    both = cost(9)
    assert both.bytes_read == 3 * p.nbytes + u.nbytes
    assert both.bytes_written == 2 * p.nbytes + u.nbytes
