"""The selective scan: definition, chunks and spans, documents, states, extreme steps, cost."""

import inspect

import pytest
import torch
from llmtrain_kernels import selective_scan as module
from llmtrain_kernels.selective_scan import cost, reference, selective_scan
from torch.utils.flop_counter import FlopCounterMode

B, D, G, K = 2, 6, 2, 5
EXACT = {"rtol": 1e-10, "atol": 1e-10}
NAMES = ("u_BTD", "delta_BTD", "A_DK", "b_BTGK", "c_BTGK", "skip_D")


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens, *, dtype=torch.float64, step=0.5):
    """u, delta, A, b, c, skip that want gradients; steps around `step`, rates 0 to -3."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = (
        random(B, tokens, D, seed=0, dtype=dtype),
        step * random(B, tokens, D, seed=1, dtype=wide).abs(),
        -random(D, K, seed=2, dtype=wide).abs(),
        random(B, tokens, G, K, seed=3, dtype=dtype),
        random(B, tokens, G, K, seed=4, dtype=dtype),
        random(D, seed=5, dtype=wide),
    )
    return [x.requires_grad_() for x in tensors]


def documents(tokens, share=0.15):
    generator = torch.Generator().manual_seed(tokens)
    starts_BT = torch.rand(B, tokens, generator=generator) < share
    return starts_BT.cumsum(dim=1, dtype=torch.int32)


def with_gradients(arguments, *, initial=None, **options):
    y, state = selective_scan(*arguments, initial_state_BDK=initial, return_state=True, **options)
    leaves = [*arguments, *([] if initial is None else [initial])]
    ends = [random(*x.shape, seed=9, dtype=x.dtype) for x in (y, state)]
    return [y, state, *torch.autograd.grad((y, state), leaves, ends)]


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[4, 1000])
def span(request, monkeypatch):
    """Spans of 4 tokens, as on a GPU only larger, and one span a chunk, as on a CPU."""
    monkeypatch.setattr(module, "span_of", lambda x: request.param)


def test_reference_has_the_signature():
    expected = inspect.signature(selective_scan).parameters
    expected = [p for name, p in expected.items() if name not in ("chunk", "backend")]
    assert list(inspect.signature(reference).parameters.values()) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_definition(packed):
    """The loop against the sum over all pairs, each with its own product of decays."""
    tokens = 9
    u, delta, A, b, c, skip = (x.detach() for x in inputs(tokens))
    ids = documents(tokens, 0.3) if packed else None
    initial = None if packed else random(B, D, K, seed=7)
    y, state = selective_scan(
        u,
        delta,
        A,
        b,
        c,
        skip,
        initial_state_BDK=initial,
        doc_ids_BT=ids,
        return_state=True,
        backend="reference",
    )
    for row in range(B):
        for d in range(D):
            for i in range(tokens):
                h = torch.zeros(K, dtype=torch.float64)
                for j in range(i + 1):
                    if ids is None or ids[row, i] == ids[row, j]:
                        decay = (delta[row, j + 1 : i + 1, d].sum() * A[d]).exp()
                        h = h + decay * delta[row, j, d] * u[row, j, d] * b[row, j, d // 3]
                if initial is not None:
                    h = h + (delta[row, : i + 1, d].sum() * A[d]).exp() * initial[row, d]
                expected = h @ c[row, i, d // 3] + skip[d] * u[row, i, d]
                torch.testing.assert_close(y[row, i, d], expected, **EXACT)
            torch.testing.assert_close(state[row, d], h, **EXACT)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70])
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
def test_chunks_are_the_loop(tokens, start, span):
    """Outputs, last state and every gradient, written by hand, against autograd of the loop."""
    arguments = inputs(tokens)
    options = {"doc_ids_BT": documents(tokens)} if start == "documents" else {}
    if start == "state":
        options["initial"] = random(B, D, K, seed=8).requires_grad_()
    got = with_gradients(arguments, chunk=16, **options)
    expected = with_gradients(arguments, backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


def test_the_operators_are_registered_soundly():
    """Schema, fake results and autograd, as torch.compile will rely on them."""
    u, delta, A, b, c, _ = inputs(9)
    initial = random(B, D, K, seed=8).requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for ids in (None, documents(9)):
        arguments = (u, delta, A, b, c, initial, ids, 4)
        torch.library.opcheck(module.scan, arguments, test_utils=checks)


def test_layout_does_not_matter_and_inputs_stay():
    arguments = [x.detach() for x in inputs(40)]
    before = [x.clone() for x in arguments]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:2]]
    y, state = selective_scan(*turned, *arguments[2:], chunk=16)
    assert state is None
    torch.testing.assert_close(y, selective_scan(*arguments, chunk=16)[0], **EXACT)
    assert all(x.equal(z) for x, z in zip(arguments, before, strict=True))


@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_row_may_be_split_anywhere(cut):
    u, delta, A, b, c, skip = inputs(50)
    y, state = selective_scan(u, delta, A, b, c, skip, return_state=True, chunk=16)
    parts, middle = [], None
    for now in (slice(0, cut), slice(cut, 50)):
        part, middle = selective_scan(
            u[:, now],
            delta[:, now],
            A,
            b[:, now],
            c[:, now],
            skip,
            initial_state_BDK=middle,
            return_state=True,
            chunk=16,
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), y, **EXACT)
    torch.testing.assert_close(middle, state, **EXACT)


@pytest.mark.parametrize("step", [0.001, 0.1, 2.0])
def test_low_precision_is_near_float64(step, span):
    """Everything inside is float32: bfloat16 costs one rounding, 2^-9 / sqrt(3) at most 0.0017."""
    for dtype, bound in ((torch.float32, 3e-6), (torch.bfloat16, 0.002)):
        low = inputs(1024, dtype=dtype, step=step)
        y, state = selective_scan(*low, return_state=True)
        exact, last = selective_scan(*[x.double() for x in low], return_state=True)
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        assert relative(y, exact) < bound
        assert relative(state, last) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_decays(dtype, backend, packed, span):
    """Rates from nothing to the largest number: no NaN, no infinity, the values of float64."""
    arguments = inputs(100, dtype=dtype)
    rates = torch.tensor([0.0, -1e-30, -1.0, -100.0, -3.3e38])
    arguments[2] = rates.expand(D, K).clone().requires_grad_()
    options = {"doc_ids_BT": documents(100)} if packed else {}
    got = with_gradients(arguments, backend=backend, chunk=16, **options)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    expected = with_gradients(exact, backend="reference", **options)
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all()
        assert relative(x, y) < (0.006 if dtype == torch.bfloat16 else 2e-6)


def test_states_are_kept_once_a_chunk():
    """Saved for the backward pass: the inputs and the states before each chunk."""
    tokens, saved = 512, {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments = inputs(tokens, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = selective_scan(*arguments, chunk=64)
    assert held is not None
    sizes = {"width": D, "groups": G, "k_width": K, "dtype": torch.float32}
    expected = cost(B * tokens, **sizes, chunk=64)[0].saved_bytes
    assert expected <= sum(saved.values()) <= expected + 8 * D * K


def test_flops_are_those_counted():
    tokens = 11
    u, delta, A, b, c, skip = inputs(tokens)
    with FlopCounterMode(display=False) as forward:
        y, _ = selective_scan(u, delta, A, b, c, skip, backend="reference")
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    expected = cost(B * tokens, width=D, groups=G, k_width=K, dtype=u.dtype)
    assert [x.flops for x in expected] == [forward.get_total_flops(), backward.get_total_flops()]
    assert expected[0].bytes_read == sum(x.numel() * 8 for x in (u, delta, b, c))
    assert expected[0].bytes_written == y.numel() * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, "got backend='fast', expected auto or one of chunked, reference"),
        ({"chunk": 0}, "got chunk=0, expected at least 1"),
        ({"b_BTGK": torch.zeros(B, 4, 4, K)}, "got b .* whose groups divide the channels"),
        ({"A_DK": torch.zeros(D, K + 1)}, r"A \(6, 6\).* expected u's rows, tokens and channels"),
        ({"delta_BTD": torch.zeros(B, 5, D)}, r"got delta \(2, 5, 6\)"),
        ({"skip_D": torch.zeros(1)}, r"skip \(1,\) for u"),
        ({"initial_state_BDK": torch.zeros(B, K, D)}, r"got an initial state \(2, 5, 6\), expect"),
        (
            {
                "initial_state_BDK": torch.zeros(B, D, K),
                "doc_ids_BT": torch.zeros(B, 4, dtype=torch.int32),
            },
            "got an initial state together with documents",
        ),
    ],
)
def test_messages(changes, message):
    arguments = dict(zip(NAMES, (x.detach() for x in inputs(4)), strict=True))
    with pytest.raises(ValueError, match=f"selective_scan: .*{message}"):
        selective_scan(**{**arguments, **changes})
