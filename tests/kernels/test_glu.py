"""Gated linear units on a packed projection: definition, formula of the CPU, choice, cost."""

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels import triton_backend
from llmtrain_kernels.glu import ACTIVATIONS, cost, glu, reference, select_backend
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def packed(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def test_reference_has_the_arguments():
    expected = inspect.signature(glu).parameters
    plain = [p for name, p in expected.items() if name != "backend"]
    assert list(inspect.signature(reference).parameters.values()) == plain


def test_definition():
    x = packed(2, 3, 10)
    gate, up = x[..., :5], x[..., 5:]
    normal = torch.distributions.Normal(torch.zeros((), dtype=x.dtype), 1.0)
    cubic = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    expected = {
        "silu": gate / (1 + torch.exp(-gate)),
        "gelu": gate * normal.cdf(gate),
        "gelu_tanh": gate * (1 + torch.tanh(cubic)) / 2,
    }
    for activation in ACTIVATIONS:
        got = reference(x, activation=activation)
        torch.testing.assert_close(got, expected[activation] * up, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_reference(activation):
    x = packed(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference(z, activation=activation), x)


def test_reference_rounds_once():
    x = packed(64, 32, dtype=torch.bfloat16)
    expected = reference(x.double()).bfloat16()
    assert reference(x).ne(expected).float().mean() < 1e-3  # float32 is not float64
    assert glu(x, backend="torch").ne(expected).float().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_cpu_it_is_the_plain_formula(activation, dtype):
    """Bit for bit, gradients too."""
    x = packed(3, 5, 14, dtype=dtype).requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    kinds = {"silu": F.silu, "gelu": F.gelu}
    kinds["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")
    expected = kinds[activation](gate) * up
    got = glu(x, activation=activation)
    dy = packed(*got.shape, dtype=dtype, seed=1)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (got, expected)]
    assert got.equal(expected)
    assert gradients[0].equal(gradients[1])


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="glu: got a last dimension of 5, expected an even one"):
        glu(packed(2, 5))
    with pytest.raises(ValueError, match="glu: got activation='relu', expected one of silu, gelu"):
        glu(packed(2, 4), activation="relu")
    with pytest.raises(ValueError, match="glu: got backend='cuda', expected auto or one of triton"):
        glu(packed(2, 4), backend="cuda")


def test_a_backend_that_cannot_run():
    with pytest.raises(ValueError, match=r"glu: got backend='triton'.*run on cuda, not cpu; set"):
        glu(packed(2, 4, dtype=torch.float32), backend="triton")
    with pytest.raises(ValueError, match=r"take float32, bfloat16 and float16, not float64"):
        select_backend("triton", "cuda", torch.float64)


def test_choice_is_logged_once(caplog):
    triton_backend.automatic.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select_backend("auto", "cpu", torch.bfloat16) == "torch"
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.skipif(not triton_backend.HAS_TRITON, reason="no triton")
def test_a_gpu_runs_triton():
    assert select_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert select_backend("torch", "cuda", torch.bfloat16) == "torch"


def test_one_graph():
    x = packed(2, 3, 8, dtype=torch.float32)
    compiled = torch.compile(glu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, activation="gelu"), glu(x, activation="gelu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost_is_what_goes_in_and_out(dtype):
    x = packed(3, 5, 14, dtype=dtype).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = reference(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    forward, backward = cost(15, hidden=7, dtype=dtype)
    assert forward.flops == backward.flops == counter.get_total_flops() == 0
    assert (forward.bytes_read, forward.bytes_written) == (x.nbytes, y.nbytes)
    assert (backward.bytes_read, backward.bytes_written) == (x.nbytes + y.nbytes, dx.nbytes)
    assert forward.saved_bytes == x.nbytes
