"""The scalar-decay recurrence: definition, chunks, documents, states, extreme gates, cost."""

import inspect

import pytest
import torch
from llmtrain_kernels.scalar_decay import chunked, cost, reference, scalar_decay
from torch.utils.flop_counter import FlopCounterMode

B, H, G, K, V = 2, 4, 2, 8, 6
EXACT = {"rtol": 1e-10, "atol": 1e-10}
EXTREME = (0.0, -1e-30, -1.0, -100.0, -1e4, -3e38, -3.4e38)


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens, *, dtype=torch.float64, gate=0.5, heads=H, groups=G):
    """q, k, v, g that want gradients; gates uniform in [-gate, 0]."""
    shapes = (groups, K), (groups, K), (heads, V)
    qkv = [random(B, tokens, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    uniform = torch.rand(B, tokens, heads, generator=torch.Generator().manual_seed(3))
    g_BTH = (-gate * uniform).to(torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in (*qkv, g_BTH)]


def documents(tokens, share=0.1):
    """Two rows cut differently; some documents of one token."""
    generator = torch.Generator().manual_seed(tokens)
    starts_BT = torch.rand(B, tokens, generator=generator) < share
    return starts_BT.cumsum(dim=1, dtype=torch.int32)


def with_gradients(arguments, *, initial=None, **options):
    """[o, state, and the gradients of everything for random gradients of both]."""
    o, state = scalar_decay(*arguments, initial_state_BHKV=initial, return_state=True, **options)
    leaves = [*arguments, *([] if initial is None else [initial])]
    ends = [random(*x.shape, seed=9, dtype=x.dtype) for x in (o, state)]
    return [o, state, *torch.autograd.grad((o, state), leaves, ends)]


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def test_backends_share_the_signature():
    expected = inspect.signature(scalar_decay).parameters
    plain = [p for name, p in expected.items() if name not in ("chunk", "backend")]
    assert list(inspect.signature(reference.run).parameters.values()) == plain
    chunks = [p for name, p in expected.items() if name != "backend"]
    assert list(inspect.signature(chunked.run).parameters.values()) == chunks


@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_the_definition(packed):
    """The loop against the sum over all pairs, each with its own product of decays."""
    tokens = 13
    q, k, v, g = inputs(tokens)
    ids = documents(tokens, 0.3) if packed else None
    initial = None if packed else random(B, H, K, V, seed=7)
    o, state = scalar_decay(
        q,
        k,
        v,
        g,
        scale=0.7,
        initial_state_BHKV=initial,
        doc_ids_BT=ids,
        return_state=True,
        backend="reference",
    )
    for b in range(B):
        for h in range(H):
            for i in (0, 5, tokens - 1):
                S = torch.zeros(K, V, dtype=torch.float64)
                for j in range(i + 1):
                    if ids is None or ids[b, j] == ids[b, i]:
                        decay = g[b, j + 1 : i + 1, h].exp().prod()
                        S = S + decay * torch.outer(k[b, j, h // 2], v[b, j, h])
                if initial is not None:
                    S = S + g[b, : i + 1, h].exp().prod() * initial[b, h]
                torch.testing.assert_close(o[b, i, h], 0.7 * q[b, i, h // 2] @ S, **EXACT)
            torch.testing.assert_close(state[b, h], S, **EXACT)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
def test_chunks_are_the_loop(tokens, start):
    """Outputs, last state and every gradient. With the initial state 1000 tokens are 64 chunks in
    four blocks, and 640 are 41 in three of 14."""
    arguments = inputs(tokens)
    options = {"doc_ids_BT": documents(tokens)} if start == "documents" else {}
    if start == "state":
        options["initial"] = random(B, H, K, V, seed=8).requires_grad_()
    got = with_gradients(arguments, chunk=16, **options)
    expected = with_gradients(arguments, backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


def test_documents_longer_than_a_block_of_chunks():
    """Boundaries before, at and behind the edges of chunks (4 tokens) and blocks (16 chunks)."""
    tokens = 300
    starts_BT = torch.zeros(B, tokens, dtype=torch.bool)
    starts_BT[0, [4, 63, 128]] = True
    starts_BT[1, [1, 64, 65, 299]] = True
    ids = starts_BT.cumsum(dim=1, dtype=torch.int32)
    arguments = inputs(tokens)
    got = with_gradients(arguments, chunk=4, doc_ids_BT=ids)
    expected = with_gradients(arguments, backend="reference", doc_ids_BT=ids)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chunk", [1, 5, 64, 999])
def test_groups_and_chunk_sizes(groups, chunk):
    arguments = inputs(70, groups=groups)
    got = with_gradients(arguments, chunk=chunk)
    expected = with_gradients(arguments, backend="reference")
    torch.testing.assert_close(got, expected, **EXACT)


def test_layout_does_not_matter_and_inputs_stay():
    arguments = [x.detach() for x in inputs(40)]
    before = [x.clone() for x in arguments]
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments]
    o, state = scalar_decay(*turned, chunk=16)
    assert state is None
    torch.testing.assert_close(o, scalar_decay(*arguments, chunk=16)[0], **EXACT)
    assert all(x.equal(y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_row_may_be_split_anywhere(cut):
    arguments = inputs(80)
    o, state = scalar_decay(*arguments, return_state=True, chunk=16)
    first, middle = scalar_decay(*[x[:, :cut] for x in arguments], return_state=True, chunk=16)
    second, last = scalar_decay(
        *[x[:, cut:] for x in arguments], initial_state_BHKV=middle, return_state=True, chunk=16
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), o, **EXACT)
    torch.testing.assert_close(last, state, **EXACT)


@pytest.mark.parametrize("gate", [0.001, 0.5, 8.0])
def test_bfloat16_is_near_float64(gate):
    """Rounding once costs 2^-9 / sqrt(3) = 0.0011 to 0.0017; weights, states and results of the
    chunks are rounded, and here the gradients that go in (0.0017) as well."""
    low = inputs(2048, dtype=torch.bfloat16, gate=gate)
    exact = [x.detach().double().requires_grad_() for x in low]
    got, expected = with_gradients(low), with_gradients(exact)
    assert got[0].dtype == torch.bfloat16
    assert got[1].dtype == torch.float32
    assert max(relative(x, y) for x, y in zip(got[:2], expected, strict=False)) < 0.004
    assert max(relative(x, y) for x, y in zip(got[2:], expected[2:], strict=True)) < 0.006


@pytest.mark.parametrize("gate", [0.001, 0.5, 8.0])
def test_float32_is_exact_over_thousands_of_tokens(gate):
    low = inputs(4096, dtype=torch.float32, gate=gate)
    o, state = scalar_decay(*low, return_state=True)
    exact, last = scalar_decay(*[x.double() for x in low], return_state=True)
    assert relative(o, exact) < 3e-6
    assert relative(state, last) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_gates(dtype, backend, packed):
    """No NaN, no infinity, and the values of float64."""
    tokens = 200
    arguments = inputs(tokens, dtype=dtype)
    pick = torch.randint(len(EXTREME), (B, tokens, H), generator=torch.Generator().manual_seed(4))
    gates = torch.tensor(EXTREME)[pick].to(arguments[3].dtype)
    arguments[3] = gates.requires_grad_()
    options = {"doc_ids_BT": documents(tokens)} if packed else {}
    got = with_gradients(arguments, backend=backend, **options)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    expected = with_gradients(exact, backend="reference", **options)
    bound = 0.007 if dtype == torch.bfloat16 else 2e-6
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all()
        assert relative(x, y) < bound


@pytest.mark.parametrize("gate", EXTREME)
def test_constant_extreme_gate(gate):
    arguments = inputs(150, dtype=torch.float32)
    arguments[3] = torch.full((B, 150, H), gate).requires_grad_()
    for x in with_gradients(arguments):
        assert x.isfinite().all()


def test_flops_are_those_counted():
    tokens = 17
    q, k, v, g = inputs(tokens)
    # a leaf of its own for the state, so that the first token's gradient of S is counted too
    initial = torch.zeros(B, H, K, V, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        o, _ = scalar_decay(q, k, v, g, initial_state_BHKV=initial, backend="reference")
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    sizes = {"heads": H, "groups": G, "k_width": K, "v_width": V, "dtype": q.dtype}
    expected = cost(B * tokens, **sizes)
    assert [c.flops for c in expected] == [forward.get_total_flops(), backward.get_total_flops()]
    assert expected[0].bytes_read == sum(x.numel() * 8 for x in (q, k, v, g))
    assert expected[0].bytes_written == o.numel() * 8
    assert expected[1].bytes_read == expected[0].saved_bytes + o.numel() * 8
    assert expected[1].bytes_written == expected[0].bytes_read


def test_memory_is_linear_in_tokens():
    """Bytes kept for the backward pass: twice the tokens, twice the bytes."""

    def saved(tokens):
        seen = {}

        def keep(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        arguments = inputs(tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            held = scalar_decay(*arguments, chunk=16)  # keeps the graph, so no address is reused
        assert held is not None
        return sum(seen.values())

    assert saved(4096) < 2.1 * saved(2048)


def wrong(**changes):
    q, k, v, g = (x.detach() for x in inputs(4))
    arguments = {"q_BTGK": q, "k_BTGK": k, "v_BTHV": v, "g_BTH": g, **changes}
    return scalar_decay(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, "got backend='fast', expected auto or one of chunked, reference"),
        ({"chunk": 0}, "got chunk=0, expected at least 1"),
        ({"q_BTGK": torch.zeros(B, 4, 1, K)}, ".*expected queries and keys of one shape"),
        ({"v_BTHV": torch.zeros(B, 4, 3, V)}, ".*3 value heads, .* whose groups divide the heads"),
        ({"g_BTH": torch.zeros(B, 4, 1)}, "got keys .* and gates .* one number a head"),
        ({"initial_state_BHKV": torch.zeros(B, H, V, K)}, "got an initial state .*expected"),
        (
            {
                "initial_state_BHKV": torch.zeros(B, H, K, V),
                "doc_ids_BT": torch.zeros(B, 4, dtype=torch.int32),
            },
            "got an initial state together with documents",
        ),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ValueError, match=f"scalar_decay: {message}"):
        wrong(**changes)
