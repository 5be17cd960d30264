"""Every backend of attention that runs here, against the float64 reference."""

import inspect

import pytest
import torch
from llmtrain_kernels.attention import BACKENDS, attention, sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel

B, H, G, K, V = 2, 6, 2, 8, 8
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def inputs(tokens, keys=None, *, dtype=torch.float64, scale=1.0, k_width=K, v_width=V, seed=0):
    """q_BTHK, k_BSGK, v_BSGV that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    keys = tokens if keys is None else keys
    shapes = (B, tokens, H, k_width), (B, keys, G, k_width), (B, keys, G, v_width)
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def documents(tokens):
    """Two rows cut differently; some documents of one token."""
    generator = torch.Generator().manual_seed(tokens)
    return (torch.rand(B, tokens, generator=generator) < 0.15).cumsum(dim=1)


def with_gradients(q, k, v, **arguments):
    """[o, dq, dk, dv] for a random gradient of o."""
    o = attention(q, k, v, **arguments)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [o, *torch.autograd.grad(o, (q, k, v), do.to(o.dtype))]


def test_backends_share_the_signature():
    expected = inspect.signature(attention).parameters
    expected = [p for name, p in expected.items() if name != "backend"]
    for name, backend in BACKENDS.items():
        assert list(inspect.signature(backend.run).parameters.values()) == expected, name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_reference_is_the_definition(causal, window, packed, sinks, softcap):
    """The loop against one masked softmax over all pairs, whose mask is written out here."""
    if sinks and (window is None or not causal):
        window, causal = 2, True
    tokens = 19
    q, k, v = inputs(tokens, v_width=5)
    ids = documents(tokens) if packed else None
    mask = torch.zeros(B, 1, tokens, tokens, dtype=torch.bool)
    for b in range(B):
        for i in range(tokens):
            for j in range(tokens):
                start = 0 if ids is None else ids[b].tolist().index(ids[b, j])
                near = window is None or abs(i - j) < window or j - start < sinks
                same = ids is None or ids[b, i] == ids[b, j]
                mask[b, 0, i, j] = near and same and (j <= i or not causal)
    k_all, v_all = (x.repeat_interleave(H // G, dim=2).transpose(1, 2) for x in (k, v))
    scores = 0.3 * q.transpose(1, 2) @ k_all.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_all
    options = {"causal": causal, "window": window, "sinks": sinks, "softcap": softcap}
    for backend in ("reference", "eager"):
        got = attention(q, k, v, **options, scale=0.3, doc_ids_BT=ids, backend=backend)
        torch.testing.assert_close(got, expected.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"causal": False},
        {"window": 7},
        {"window": 7, "causal": False},
        {"window": 7, "sinks": 3},
        {"scale": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_is_the_reference(tokens, arguments, packed):
    if packed:
        arguments = {**arguments, "doc_ids_BT": documents(tokens)}
    q, k, v = inputs(tokens)
    got = with_gradients(q, k, v, backend="sdpa", **arguments)
    expected = with_gradients(q, k, v, backend="reference", **arguments)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("arguments", [{}, {"window": 7, "sinks": 3}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_auto_caps_scores(arguments, packed):
    """With gradients; scores far beyond the cap."""
    if packed:
        arguments = {**arguments, "doc_ids_BT": documents(65)}
    q, k, v = inputs(65, scale=3.0)
    got = with_gradients(q, k, v, softcap=1.5, **arguments)
    expected = with_gradients(q, k, v, softcap=1.5, backend="reference", **arguments)
    torch.testing.assert_close(got, expected, **EXACT)
    assert not torch.allclose(got[0], attention(q, k, v, **arguments), atol=1e-3)


def test_sdpa_is_the_reference_over_a_thousand_tokens():
    q, k, v = inputs(1000)
    for arguments in ({}, {"doc_ids_BT": documents(1000), "window": 300}):
        got = with_gradients(q, k, v, backend="sdpa", **arguments)
        expected = with_gradients(q, k, v, backend="reference", **arguments)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 1)])
def test_head_groups(heads, groups):
    """Query head h reads group h // (H / G): every head on its own group must give the same."""
    q = inputs(9)[0][:, :, :heads]
    k, v = (torch.randn(B, 9, groups, K, dtype=torch.float64) for _ in range(2))
    for backend in ("sdpa", "reference"):
        got = attention(q, k, v, backend=backend)
        for h in range(heads):
            g = h // (heads // groups)
            one = attention(*(x[:, :, i : i + 1] for x, i in ((q, h), (k, g), (v, g))))
            torch.testing.assert_close(got[:, :, h : h + 1], one, **EXACT)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_widths_may_differ_and_layout_does_not_matter():
    q, k, v = inputs(12, v_width=5)
    expected = with_gradients(q, k, v, backend="reference")
    got = with_gradients(q, k, v, backend="sdpa")
    torch.testing.assert_close(got, expected, **EXACT)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for backend in ("sdpa", "reference", "flex"):
        o = attention(*strided, backend=backend)
        torch.testing.assert_close(o, expected[0].detach(), **EXACT)


def test_large_scores():
    """A softmax that is one-hot to rounding must not overflow."""
    q, k, v = inputs(40, scale=60.0)
    got = with_gradients(q, k, v, backend="sdpa")
    expected = with_gradients(q, k, v, backend="reference")
    assert all(x.isfinite().all() for x in expected)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_low_precision_is_near_float64(dtype, packed):
    """From the same rounded inputs, at most twice the reference's own rounding and a little."""
    low = inputs(100, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    arguments = {"doc_ids_BT": documents(100)} if packed else {}
    expected = with_gradients(*exact, backend="reference", **arguments)
    own = with_gradients(*low, backend="reference", **arguments)
    got = with_gradients(*low, backend="sdpa", **arguments)
    eps = torch.finfo(dtype).eps
    for x, ours, y in zip(got, own, expected):
        assert x.dtype == ours.dtype == dtype
        error, rounding = ((z.double() - y).norm() / y.norm() for z in (x, ours))
        assert rounding < 2 * eps
        assert error < 2 * rounding + 2 * eps


def cache(tokens, slots, ages):
    """Positions of rows that have read `ages` tokens into a ring of `slots`, and then `tokens`."""
    k_positions = torch.full((B, slots), -1)
    for row, age in enumerate(ages):
        for p in range(age + tokens):
            k_positions[row, p % slots] = p
    q_positions = torch.tensor(ages)[:, None] + torch.arange(tokens)
    return q_positions, k_positions


@pytest.mark.parametrize(
    ("tokens", "slots", "ages", "window"),
    [(1, 10, [3, 9], None), (1, 4, [2, 30], 4), (1, 16, [0, 15], 3), (5, 16, [0, 9], None)],
)
def test_cache(tokens, slots, ages, window):
    """Keys in any slot order, rows of different ages, empty slots: as over the keys in order."""
    q, k, v = (x.detach() for x in inputs(tokens, slots))
    q_positions, k_positions = cache(tokens, slots, ages)
    for backend in ("sdpa", "reference"):
        got = attention(
            q,
            k,
            v,
            window=window,
            q_positions_BT=q_positions,
            k_positions_BS=k_positions,
            backend=backend,
        )
        for row, age in enumerate(ages):
            for t in range(tokens):
                p = age + t
                first = 0 if window is None else max(0, p - window + 1)
                order = [k_positions[row].tolist().index(i) for i in range(first, p + 1)]
                seen = [x[row, order].repeat_interleave(H // G, dim=1) for x in (k, v)]
                weights = torch.einsum("hk,shk->hs", q[row, t] * K**-0.5, seen[0]).softmax(-1)
                expected = torch.einsum("hs,shv->hv", weights, seen[1])
                torch.testing.assert_close(got[row, t], expected, **EXACT)


def test_cache_with_sinks_and_softcap():
    """Three sinks and a window of 4 of 30 tokens, slots in any order, and an empty one."""
    q, k, v = (x.detach() for x in inputs(1, 30))
    kept = [0, 1, 2, 26, 27, 28, 29]
    order = torch.tensor([5, 0, 6, 3, 2, 4, 1])
    options = {"window": 4, "sinks": 3, "softcap": 0.7}
    whole = torch.zeros(B, 30, H, K, dtype=torch.float64)
    whole[:, -1:] = q
    expected = attention(whole, k, v, backend="reference", **options)[:, -1:]
    slots = torch.tensor(kept)[order]
    positions = torch.cat([slots, torch.tensor([-1])]).expand(B, -1)
    k, v = (torch.cat([x[:, slots], x[:, :1]], dim=1) for x in (k, v))
    for backend in ("auto", "reference"):
        got = attention(
            q,
            k,
            v,
            q_positions_BT=torch.full((B, 1), 29),
            k_positions_BS=positions,
            backend=backend,
            **options,
        )
        torch.testing.assert_close(got, expected, **EXACT)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"window": 7}, {"causal": False}, {"window": 7, "sinks": 3}, {"softcap": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_flex_is_the_reference(arguments, packed):
    """Its forward pass; the backward pass exists on GPUs only, where kernels/bench checks it."""
    if packed:
        arguments = {**arguments, "doc_ids_BT": documents(70)}
    q, k, v = (x.detach() for x in inputs(70))
    got = attention(q, k, v, backend="flex", **arguments)
    expected = attention(q, k, v, backend="reference", **arguments)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed):
    """Also when every size of the inputs changes between calls."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for tokens, width, heads in ((33, 8, 6), (34, 16, 4), (35, 24, 2)):
        arguments = {"doc_ids_BT": documents(tokens)} if packed else {}
        q, k, v = inputs(tokens, k_width=width)
        q = q[:, :, :heads]
        torch.testing.assert_close(
            compiled(q, k, v, **arguments), attention(q, k, v, **arguments), **EXACT
        )


def test_order_of_cuda_kernels_compiles(monkeypatch):
    """The priorities that CUDA uses are traceable; on the CPU they change nothing."""
    for order in (sdpa.CUDNN_FIRST, sdpa.FLASH_FIRST):
        assert set(order) == {
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        }
        monkeypatch.setattr(
            sdpa, "kernel_order", lambda q, masked, o=order: sdpa_kernel(o, set_priority=True)
        )
        torch._dynamo.reset()
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        q, k, v = inputs(33)
        torch.testing.assert_close(
            with_gradients(q, k, v, backend="reference")[0], compiled(q, k, v), **EXACT
        )


def test_dense_rows_take_the_flash_kernel_of_the_cpu():
    """Grouped heads too, so keys are not repeated in memory."""
    q, k, v = inputs(33, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        attention(q, k, v)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4, "groups": 3}, "4 query heads, 3 key and 3 value groups, .* n_kv_heads"),
        ({"window": 0}, "window=0, expected at least 1 .* null for no window"),
        ({"sinks": 2}, "sinks=2 with window=None and causal=True, expected 0, .* set sinks"),
        ({"sinks": 2, "window": 3, "causal": False}, "sinks=2 with window=3 and causal=False"),
        ({"softcap": 0.0}, "softcap=0.0, expected a positive number; set softcap to null"),
        ({"q_positions_BT": torch.zeros(B, 5)}, "positions for only one .* give q_positions_BT"),
        ({"keys": 6}, "5 queries and 6 keys a row, expected equal .* to read a cache"),
        (
            {"cu_seqlens": torch.tensor([0, 5, 10]), "max_seqlen": 5},
            "cu_seqlens without doc_ids_BT, expected both; backends that take a mask need the ids",
        ),
        (
            {
                "q_positions_BT": torch.zeros(B, 5),
                "k_positions_BS": torch.zeros(B, 5),
                "doc_ids_BT": torch.zeros(B, 5),
            },
            "positions and documents, expected one of them; a cache holds one",
        ),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    change = dict(change)
    heads, groups = change.pop("heads", H), change.pop("groups", G)
    q, k = torch.zeros(B, 5, heads, K), torch.zeros(B, change.pop("keys", 5), groups, K)
    with pytest.raises(ValueError, match=f"attention: got {message}"):
        attention(q, k, k, **change)
