import pytest
import torch

from llmtrain.model.head_norm import HeadNorm


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_every_head_by_itself(kind):
    norm = HeadNorm(3, 8, kind=kind, eps=1e-3).double()
    norm.reset_parameters()
    with torch.no_grad():
        norm.weight.mul_(torch.rand(24, dtype=torch.float64) + 0.5)
    h_BTHV = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    centred = h_BTHV - h_BTHV.mean(dim=-1, keepdim=True) if kind == "layernorm" else h_BTHV
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(h_BTHV), expected.flatten(2) * norm.weight)


def test_statistics_of_bfloat16_are_float32():
    norm = HeadNorm(1, 4096, kind="layernorm", eps=1e-6)
    norm.reset_parameters()
    h_BTHV = (torch.randn(1, 4, 1, 4096) + 3).bfloat16()
    got = norm(h_BTHV)
    assert got.dtype == torch.bfloat16
    assert (got - norm(h_BTHV.double()).bfloat16()).abs().max() < 0.02  # one unit of the last place
