import torch

from llmtrain.model.linear import Linear


def test_computes_in_the_dtype_of_its_input_with_float32_gradients():
    torch.manual_seed(0)
    linear = Linear(64, 32, bias=True, init_std=0.5)
    linear.reset_parameters()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        linear.zero_grad()
        y = linear(torch.ones(3, 64, dtype=dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
        assert (linear.weight.grad == 3).all()


def test_first_values():
    torch.manual_seed(0)
    linear = Linear(512, 512, bias=True, init_std=0.1)
    torch.nn.init.constant_(linear.weight, float("nan"))
    torch.nn.init.constant_(linear.bias, float("nan"))
    linear.reset_parameters()
    assert (linear.bias == 0).all()
    torch.testing.assert_close(linear.weight.std().item(), 0.1, rtol=0.01, atol=0)
