import pytest
import torch

from llmtrain.model.norm import LayerNorm, RMSNorm


def defined(norm, x):
    """The equations of norm.py, in float64."""
    x, weight = x.double(), norm.weight.double()
    if getattr(norm, "zero_centered", False):
        weight = 1 + weight
    if isinstance(norm, RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    return y if norm.bias is None else y + norm.bias.double()


def build(kind, width=96, **knobs):
    torch.manual_seed(0)
    norm = kind(width, eps=1e-3, **knobs)
    norm.reset_parameters()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn(width)
    return norm


CASES = [
    (RMSNorm, {}),
    (RMSNorm, {"zero_centered": True}),
    (LayerNorm, {}),
    (LayerNorm, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "knobs"), CASES)
def test_float64_value_and_gradients(kind, knobs):
    norm = build(kind, **knobs).double()
    x = torch.randn(3, 5, 96, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), defined(norm, x), atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(norm, (x[:1, :2].detach().requires_grad_(),))
    norm(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in norm.parameters())


@pytest.mark.parametrize(("kind", "knobs"), CASES)
def test_bfloat16_is_float32_inside(kind, knobs):
    """One rounding of the weight, one of the result: a bf16 mean over 4096 would be far off."""
    norm = build(kind, width=4096, **knobs)
    x = (1000 * torch.randn(8, 4096) + 50).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), defined(norm, x), rtol=3 * 2**-8, atol=2e-2)


def test_starts_as_the_plain_norm():
    for norm, first in ((RMSNorm(8), 1), (RMSNorm(8, zero_centered=True), 0), (LayerNorm(8), 1)):
        torch.nn.init.constant_(norm.weight, float("nan"))
        norm.reset_parameters()
        assert (norm.weight == first).all()
        y = norm(torch.randn(64, 8))
        torch.testing.assert_close(y.square().mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
