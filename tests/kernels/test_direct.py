"""Calls of an operator without its layers: when they are taken, and that they compute the same."""

import functools

import pytest
import torch
from llmtrain_kernels.direct import direct
from torch._subclasses.fake_tensor import FakeTensorMode

CALLS = []


def triple(x):
    CALLS.append("computed")
    return 3 * x


@torch.library.custom_op("llmtrain_tests::triple", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    CALLS.append("operator")
    return triple(x)


@operator.register_fake
def _(x):
    return x.new_empty(x.shape)


def setup_context(ctx, inputs, output):
    ctx.shape = output.shape


def gradients(take, ctx, dy):
    return take(dy)


operator.register_autograd(functools.partial(gradients, operator), setup_context=setup_context)
call = direct(operator, triple, setup_context, functools.partial(gradients, triple))


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    torch._dynamo.reset()
    return CALLS


def test_eager_calls_pass_the_operator_by(calls):
    x = torch.randn(4, requires_grad=True)
    y = call(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close([y, dx], [3 * x, torch.full_like(x, 3.0)], rtol=0, atol=0)
    assert calls == ["computed"] * 2
    with torch.no_grad():
        assert not call(x).requires_grad


def test_torch_compile_takes_the_operator(calls):
    x = torch.randn(4, requires_grad=True)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close([y, dx], [3 * x, torch.full_like(x, 3.0)], rtol=0, atol=0)
    assert calls == ["operator", "computed"] * 2


def test_fake_tensors_are_not_computed_with(calls):
    with FakeTensorMode():
        assert call(torch.empty(4, 5)).shape == (4, 5)
    assert calls == []


def test_second_derivatives():
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"triple.*create_graph=True.*backend=reference"):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)

    def again(ctx, dy):
        return twice(dy)

    twice = direct(operator, triple, setup_context, again, twice=True)
    assert torch.autograd.gradgradcheck(twice, x)
