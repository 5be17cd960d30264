"""The causal convolution: torch's own convolution, the loop, documents, states."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels import triton_backend
from llmtrain_kernels.causal_conv import (
    causal_conv,
    chunked,
    cost,
    fused,
    reference,
    select_backend,
)

B, D, W = 2, 5, 4
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens, *, dtype=torch.float64, window=W):
    shapes = (B, tokens, D), (D, window), (D,)
    return [random(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def with_gradients(arguments, *, initial=None, **options):
    y, state = causal_conv(*arguments, initial_state_BWD=initial, return_state=True, **options)
    leaves = [*arguments, *([] if initial is None else [initial])]
    ends = [random(*x.shape, seed=9, dtype=x.dtype) for x in (y, state)]
    return [y, state, *torch.autograd.grad((y, state), leaves, ends)]


def test_backends_share_the_signature():
    expected = inspect.signature(causal_conv).parameters
    expected = [p for name, p in expected.items() if name != "backend"]
    for run in (reference, chunked, fused):
        assert list(inspect.signature(run).parameters.values()) == expected


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_torch_convolves_the_same(activation, backend):
    x_BTD, weight_DW, bias_D = inputs(9)
    y_BTD, state = causal_conv(x_BTD, weight_DW, bias_D, activation=activation, backend=backend)
    padded = F.pad(x_BTD.mT, (W - 1, 0))
    expected = F.conv1d(padded, weight_DW[:, None], bias_D, groups=D).mT
    expected = F.silu(expected) if activation == "silu" else expected
    assert state is None
    torch.testing.assert_close(y_BTD, expected, **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_chunked_is_the_loop(tokens, start, window):
    """Outputs, state and every gradient."""
    arguments, options = inputs(tokens, window=window), {}
    if start == "state":
        options["initial"] = random(B, window - 1, D, seed=5).requires_grad_()
    elif start == "documents":
        generator = torch.Generator().manual_seed(tokens)
        starts_BT = torch.rand(B, tokens, generator=generator) < 0.3
        options["doc_ids_BT"] = starts_BT.cumsum(dim=1, dtype=torch.int32)
    got = with_gradients(arguments, **options)
    expected = with_gradients(arguments, backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_documents_are_separate(backend):
    x_BTD, weight_DW, bias_D = inputs(12)
    ids = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 12], dtype=torch.int32)
    y, state = causal_conv(
        x_BTD, weight_DW, bias_D, doc_ids_BT=ids, return_state=True, backend=backend
    )
    for row, a, b in ((0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 12)):
        part, last = causal_conv(
            x_BTD[row : row + 1, a:b], weight_DW, bias_D, return_state=True, backend=backend
        )
        torch.testing.assert_close(y[row : row + 1, a:b], part, **EXACT)
        if b == 12:
            torch.testing.assert_close(state[row : row + 1], last, **EXACT)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_row_may_be_split_anywhere(cut):
    x, weight, bias = inputs(11)
    y, state = causal_conv(x, weight, bias, return_state=True)
    first, middle = causal_conv(x[:, :cut], weight, bias, return_state=True)
    second, last = causal_conv(
        x[:, cut:], weight, bias, initial_state_BWD=middle, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), y, **EXACT)
    torch.testing.assert_close(last, state, **EXACT)


def test_bfloat16_rounds_once():
    """Weights stay float32, sums too: the result is the exact one, rounded."""
    low = [x.detach() for x in inputs(200, dtype=torch.bfloat16)]
    for weight in (low[1], low[1].float()):
        y_BTD, _ = causal_conv(low[0], weight, low[2].float())
        exact, _ = causal_conv(*[x.double() for x in low])
        assert y_BTD.dtype == torch.bfloat16
        torch.testing.assert_close(y_BTD.double(), exact, rtol=2**-8, atol=1e-6)


def test_the_backward_pass_keeps_inputs_in_their_dtype():
    """Besides what the activation keeps, one copy of x, not one for each tap nor a float32 one."""
    x_BTD, weight_DW, bias_D = inputs(256, dtype=torch.bfloat16)
    seen = {}

    def keep(x):
        seen[x.untyped_storage().data_ptr()] = (x.dtype, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = causal_conv(x_BTD, weight_DW, bias_D, activation=None)
    assert held is not None
    large = [size for _, size in seen.values() if size > 1000]
    assert sum(large) <= 2.1 * x_BTD.numel() * 2


def test_cost():
    forward, backward = cost(B * 9, width=D, window=W, dtype=torch.bfloat16)
    assert forward.flops == 2 * B * 9 * D * W
    assert forward.bytes_read == forward.bytes_written == B * 9 * D * 2
    assert backward.flops == 2 * forward.flops
    x, weight, _ = inputs(9, dtype=torch.bfloat16)
    y, _ = causal_conv(x, weight)
    assert forward.bytes_read == forward.saved_bytes == x.nbytes
    assert forward.bytes_written == y.nbytes
    assert (backward.bytes_read, backward.bytes_written) == (x.nbytes + y.nbytes, x.nbytes)


@pytest.mark.skipif(not triton_backend.HAS_TRITON, reason="as on machines with triton")
def test_the_choice_of_a_backend(monkeypatch):
    """The kernels on CUDA for what they take, else torch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    low, full, exact = (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2
    assert [select_backend("auto", "cuda", z, 4) for z in (low, full)] == ["triton"] * 2
    assert select_backend("auto", "cuda", exact, 4) == "chunked"
    assert select_backend("auto", "cuda", low, 9) == "chunked"
    assert select_backend("auto", "cpu", low, 4) == "chunked"
    assert select_backend("chunked", "cuda", low, 4) == "chunked"
    with pytest.raises(ValueError, match="they take windows of 1 to 8 tokens, not 9; set backend"):
        select_backend("triton", "cuda", low, 9)
    with pytest.raises(ValueError, match="they run on cuda, not cpu; set backend to auto or chunk"):
        select_backend("triton", "cpu", low, 4)


def test_compiles_as_one_graph():
    arguments = inputs(6, dtype=torch.float32)
    expected = causal_conv(*arguments)[0]
    compiled = torch.compile(causal_conv, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments)[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backend": "fast"},
            "got backend='fast', expected auto or one of triton, chunked, reference",
        ),
        ({"activation": "relu"}, "got activation='relu', expected 'silu' or None"),
        ({"weight_DW": torch.zeros(3, W)}, r"got weight \(3, 4\) .* for 5 channels"),
        ({"bias_D": torch.zeros(3)}, r".*bias \(3,\) for 5 channels"),
        ({"initial_state_BWD": torch.zeros(B, W, D)}, r"got an initial state \(2, 4, 5\), exp"),
        (
            {
                "initial_state_BWD": torch.zeros(B, W - 1, D),
                "doc_ids_BT": torch.zeros(B, 3, dtype=torch.int32),
            },
            "got an initial state together with documents",
        ),
    ],
)
def test_messages(changes, message):
    arguments = {"x_BTD": torch.zeros(B, 3, D), "weight_DW": torch.zeros(D, W), **changes}
    with pytest.raises(ValueError, match=f"causal_conv: {message}"):
        causal_conv(**arguments)
