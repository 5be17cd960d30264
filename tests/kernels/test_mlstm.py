"""The mLSTM recurrence: definition, chunks, the stabiliser, extreme gates, precision, cost."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels.mlstm import MaxPlusScan, chunked, cost, mlstm, reference
from torch.utils.flop_counter import FlopCounterMode

B, H, K, V = 2, 3, 4, 5
EXACT = {"rtol": 1e-10, "atol": 1e-10}
EXTREME = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38])
GATES = ("exp", "sigmoid")


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens, *, dtype=torch.float64, input_bias=0.0, forget_bias=2.0):
    """q, k, v, i, f that want gradients; gates wide enough that keys and memory both win."""
    qkv = [random(B, tokens, H, w, seed=s, dtype=dtype) for s, w in enumerate((K, K, V))]
    gates_dtype = torch.promote_types(dtype, torch.float32)
    i_BTH = 3 * random(B, tokens, H, seed=3, dtype=gates_dtype) + input_bias
    f_BTH = 2 * random(B, tokens, H, seed=4, dtype=gates_dtype) + forget_bias
    return [x.requires_grad_() for x in (*qkv, i_BTH, f_BTH)]


def states(input_gate):
    shapes = ((B, H, K, V), (B, H, K), (B, H))[: 3 if input_gate == "exp" else 1]
    return tuple(random(*shape, seed=7).requires_grad_() for shape in shapes)


def documents(tokens, share=0.1):
    starts_BT = torch.rand(B, tokens, generator=torch.Generator().manual_seed(tokens)) < share
    return starts_BT.cumsum(dim=1, dtype=torch.int32)


def with_gradients(arguments, *, initial_state=None, **options):
    """[h, the last state, and the gradients of everything for random gradients of all of these]."""
    h, state = mlstm(*arguments, initial_state=initial_state, return_state=True, **options)
    leaves, ends = [*arguments, *(initial_state or ())], [h, *state]
    weights = [random(*x.shape, seed=9, dtype=x.dtype) for x in ends]
    return [h, *state, *torch.autograd.grad(ends, leaves, weights)]


def test_backends_share_the_signature():
    expected = inspect.signature(mlstm).parameters
    plain = [p for name, p in expected.items() if name not in ("chunk", "backend")]
    assert list(inspect.signature(reference).parameters.values()) == plain
    chunks = [p for name, p in expected.items() if name != "backend"]
    assert list(inspect.signature(chunked).parameters.values()) == chunks


@pytest.mark.parametrize("input_gate", GATES)
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
def test_reference_is_the_definition(input_gate, start):
    """The stabilised loop against the sum over all earlier tokens with exponentials as they are."""
    tokens = 12
    q, k, v, i, f = inputs(tokens)
    ids = documents(tokens, 0.3) if start == "documents" else torch.zeros(B, tokens)
    initial = states(input_gate) if start == "state" else None
    h, _ = mlstm(
        *(q, k, v, i, f),
        input_gate=input_gate,
        scale=0.7,
        eps=0.0,
        initial_state=initial,
        doc_ids_BT=ids if start == "documents" else None,
        backend="reference",
    )
    write = i.exp() if input_gate == "exp" else i.sigmoid()
    for b in range(B):
        for a in range(H):
            for t in (0, 5, tokens - 1):
                C, n = torch.zeros(K, V, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
                for j in range(t + 1):
                    if ids[b, j] == ids[b, t]:
                        weight = write[b, j, a] * f[b, j + 1 : t + 1, a].sigmoid().prod()
                        C = C + weight * torch.outer(k[b, j, a], v[b, j, a])
                        n = n + weight * k[b, j, a]
                if initial is not None:
                    weight = f[b, : t + 1, a].sigmoid().prod()
                    weight = weight * initial[2][b, a].exp() if input_gate == "exp" else weight
                    C = C + weight * initial[0][b, a]
                    n = n + weight * initial[1][b, a] if input_gate == "exp" else n
                expected = 0.7 * q[b, t, a] @ C
                if input_gate == "exp":
                    expected = expected / (0.7 * q[b, t, a] @ n).abs().clamp(min=1.0)
                torch.testing.assert_close(h[b, t, a], expected, **EXACT)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 300])
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
@pytest.mark.parametrize("input_gate", GATES)
def test_chunks_are_the_loop(tokens, start, input_gate):
    """Outputs, last state and every gradient."""
    options = {"input_gate": input_gate}
    if start == "documents":
        options["doc_ids_BT"] = documents(tokens)
    if start == "state":
        options["initial_state"] = states(input_gate)
    got = with_gradients(inputs(tokens), chunk=16, backend="chunked", **options)
    expected = with_gradients(inputs(tokens), backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_gradient_through_the_stabiliser(eps):
    """It has one through eps alone; with eps = 0.1 nobody can overlook it."""
    options = {"eps": eps, "doc_ids_BT": documents(70)}
    arguments = inputs(70, input_bias=2.0)
    got = with_gradients(arguments, backend="chunked", **options)
    expected = with_gradients(arguments, backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 200])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_is_the_loop(tokens, packed):
    """Values, and gradients of autograd through the loop."""
    a = (-random(B, tokens, H, seed=0).abs()).requires_grad_()
    b = (3 * random(B, tokens, H, seed=1)).requires_grad_()
    m0 = random(B, H, seed=2).requires_grad_()
    starts = None
    if packed:
        starts = torch.rand(B, tokens, generator=torch.Generator().manual_seed(3)) < 0.2
        starts[:, 0] = True
    m, values = m0, []
    for t in range(tokens):
        if packed:
            m = torch.where(starts[:, t, None], 0, m)
        m = torch.maximum(a[:, t] + m, b[:, t])
        values.append(m)
    expected, got = torch.stack(values, dim=1), MaxPlusScan.apply(a, b, m0, starts)
    torch.testing.assert_close(got, expected, **EXACT)
    weights = random(B, tokens, H, seed=4)
    gradients = [torch.autograd.grad(m, (a, b, m0), weights) for m in (got, expected)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("input_gate", GATES)
@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_prefix_may_be_split(input_gate, cut):
    """With gradients: through the state in the middle as through the whole."""
    arguments = inputs(50)
    whole = with_gradients(arguments, input_gate=input_gate, chunk=16)
    first, state = mlstm(
        *(x[:, :cut] for x in arguments), input_gate=input_gate, return_state=True, chunk=16
    )
    second, state = mlstm(
        *(x[:, cut:] for x in arguments),
        input_gate=input_gate,
        initial_state=state,
        return_state=True,
        chunk=16,
    )
    ends = [torch.cat([first, second], dim=1), *state]
    weights = [random(*x.shape, seed=9) for x in ends]
    got = [*ends, *torch.autograd.grad(ends, arguments, weights)]
    torch.testing.assert_close(got, whole, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("input_gate", GATES)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_gates_of_any_size(dtype, backend, input_gate, eps):
    """Values and gradients are finite, and near those of float64."""
    tokens, generator = 80, torch.Generator().manual_seed(5)
    # without signs no denominator cancels, which would magnify rounding without bound
    qkv = [x.detach().abs().requires_grad_() for x in inputs(tokens, dtype=dtype)[:3]]
    # all of them; only small ones, which empty the memory; only large ones
    for values in (EXTREME, EXTREME[:2], EXTREME[-2:]):
        i, f = (
            values[torch.randint(len(values), (B, tokens, H), generator=generator)].requires_grad_()
            for _ in range(2)
        )
        got = with_gradients(
            [*qkv, i, f], input_gate=input_gate, eps=eps, backend=backend, chunk=16
        )
        assert all(x.isfinite().all() for x in got)
        exact = [x.detach().double().requires_grad_() for x in (*qkv, i, f)]
        expected = mlstm(*exact, input_gate=input_gate, eps=eps, backend="reference")[0]
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
        assert (got[0].double() - expected).norm() <= tolerance * expected.norm() + 1e-20


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_precision_over_many_tokens(dtype, tolerance):
    """4096 tokens whose forget gates let the memory reach back over all of them. Compared after a
    norm, as in the block: where the denominator cancels, its error is a factor of all of h."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 4096, 2, 16, generator=generator).to(dtype) for _ in range(3)]
    i = 4 * torch.randn(1, 4096, 2, generator=generator)
    f = torch.randn(1, 4096, 2, generator=generator) + 8
    exact = [x.double() for x in (*qkv, i, f)]
    got, expected = (
        F.layer_norm(mlstm(*x, backend="chunked")[0].double(), (16,)) for x in ((*qkv, i, f), exact)
    )
    assert (got - expected).norm() / expected.norm() < tolerance


def test_auto_takes_the_loop_for_one_token():
    arguments = inputs(1)
    auto, loop = mlstm(*arguments)[0], mlstm(*arguments, backend="reference")[0]
    assert auto.equal(loop)


@pytest.mark.parametrize("input_gate", GATES)
def test_cost_is_what_the_loop_multiplies(input_gate):
    arguments = [x.detach() for x in inputs(9)]
    with FlopCounterMode(display=False) as counter:
        mlstm(*arguments, input_gate=input_gate, backend="reference")
    sizes = {"heads": H, "k_width": K, "v_width": V, "dtype": torch.bfloat16}
    forward, backward = cost(9 * B, input_gate=input_gate, **sizes)
    assert forward.flops == counter.get_total_flops()
    assert backward.flops == 2 * forward.flops
    assert forward.bytes_read == 9 * B * H * (2 * (2 * K + V) + 2 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, "mlstm: got backend='triton', expected auto or one of chunked"),
        ({"input_gate": "relu"}, "mlstm: got input_gate='relu', expected one of exp, sigmoid"),
        ({"initial_state": ()}, r"mlstm: got an initial state \[\], expected"),
        (
            {"initial_state": (), "doc_ids_BT": torch.zeros(B, 4, dtype=torch.int32)},
            "mlstm: got an initial state together with documents, expected one of them",
        ),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        mlstm(*inputs(4), **changes)
    q, k, v, i, f = inputs(4)
    with pytest.raises(
        ValueError, match=r"mlstm: got q .* expected the same rows, tokens and heads"
    ):
        mlstm(q, k, v, i[:, 1:], f)
