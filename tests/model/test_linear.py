import pytest
import torch

from llmtrain.model.linear import Linear, LinearsFromCopies, linears


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


def joined_inputs(dtype):
    """x [2, 3, 16] and weights of 8, 24 and 5 outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 16), (8, 16), (24, 16), (5, 16)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [z.to(dtype).requires_grad_() for z in made]


def joined(x, *weights):
    return LinearsFromCopies.apply(
        x, len(weights), *weights, *(w.detach().to(x.dtype) for w in weights)
    )


def test_joined_is_the_layers_one_by_one():
    assert torch.autograd.gradcheck(joined, joined_inputs(torch.float64))
    x, *weights = joined_inputs(torch.float32)
    for frozen in (x, weights[1]):
        frozen.requires_grad_(False)
        leaves = [z for z in (x, *weights) if z.requires_grad]
        results = []
        for ys in (joined(x, *weights), [torch.nn.functional.linear(x, w) for w in weights]):
            loss = sum((y * (i + 1)).square().sum() for i, y in enumerate(ys))
            results.append([*ys, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
        frozen.requires_grad_(True)


def test_joined_gives_gradients_in_the_dtypes_of_the_weights():
    x, *weights = joined_inputs(torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    ys = joined(x, *weights)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    gradients = torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *weights])
    assert [z.dtype for z in gradients] == [torch.bfloat16] + [torch.float32] * 3


def test_joined_is_one_graph():
    torch._dynamo.reset()
    inputs = joined_inputs(torch.float32)
    pairs = [torch.ones(3, 4), torch.ones(3, 2)], [torch.ones(4, 5), torch.ones(2, 5)]
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.llmtrain.sum_of_products, pairs, **checks)
    product = (torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16))
    torch.library.opcheck(torch.ops.llmtrain.product_in, (*product, torch.float32), **checks)

    def loss(*inputs):
        return sum(y.square().sum() for y in joined(*inputs))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(run(*inputs), inputs) for run in (loss, compiled)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_linears_without_copies_are_calls_of_the_layers():
    layers = [Linear(16, 8, bias=True), Linear(16, 4)]
    called = []
    for layer in layers:
        layer.reset_parameters()
        layer.register_forward_hook(lambda module, *_: called.append(module))
    x = torch.randn(3, 16)
    got = linears(x, *layers)
    assert called == layers  # as ZeRO-3 needs it, which gathers weights by such hooks
    assert all(torch.equal(y, layer(x)) for y, layer in zip(got, layers, strict=True))


@pytest.mark.gpu
def test_linears_join_copies_on_a_gpu():
    """As near to float64 as the layers one by one."""
    torch.manual_seed(0)
    layers = [Linear(512, 1024), Linear(512, 256)]
    for layer in layers:
        layer.reset_parameters()
        layer.cuda()
        layer.weight_copy = layer.weight.detach().bfloat16()
        layer.weight.data = layer.weight_copy.float()
    x = torch.randn(2, 300, 512, device="cuda").bfloat16().requires_grad_()
    parameters = [p for layer in layers for p in layer.parameters()]

    def run(ys, leaves):
        loss = sum((y.double() * (i + 1)).square().sum() for i, y in enumerate(ys))
        return [*ys, *torch.autograd.grad(loss, leaves)]

    wide_x, *wide = (z.detach().double().requires_grad_() for z in (x, *parameters))
    exact = run([torch.nn.functional.linear(wide_x, w) for w in wide], [wide_x, *wide])
    plain = [torch.nn.functional.linear(x, layer.compute_weight(x)) for layer in layers]
    plain = run(plain, [x, *parameters])
    for got in (
        run(linears(x, *layers), [x, *parameters]),
        run([z(x) for z in layers], [x, *parameters]),
    ):
        for mine, theirs, true in zip(got, plain, exact, strict=True):
            errors = [(z.double() - true).norm() / true.norm() for z in (mine, theirs)]
            assert errors[0] <= 1.1 * errors[1] + 1e-6
