"""The sLSTM recurrence: definition, the hand-written gradient, documents, states, extreme gates."""

import inspect
import logging

import pytest
import torch
from llmtrain_kernels.slstm import (
    BLOCK,
    cost,
    loop,
    op,
    persistent,
    reference,
    select_backend,
    slstm,
)
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

B, H, V = 2, 3, 4
EXACT = {"rtol": 1e-10, "atol": 1e-10}
EXTREME = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38])
FORGET_GATES = ("sigmoid", "exp")


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens, *, dtype=torch.float64):
    """x and r that want gradients; recurrent weights large enough to matter."""
    x = 2 * random(B, tokens, H, 4 * V, seed=0, dtype=dtype)
    return [x.requires_grad_(), (0.5 * random(H, V, 4 * V, seed=1, dtype=dtype)).requires_grad_()]


def states():
    h, c, n, m = (random(B, H, V, seed=s) for s in range(2, 6))
    return tuple(z.requires_grad_() for z in (h.tanh(), c, n.abs() + 0.5, m))


def documents(tokens, share=0.1):
    starts_BT = torch.rand(B, tokens, generator=torch.Generator().manual_seed(tokens)) < share
    return starts_BT.cumsum(dim=1, dtype=torch.int32)


def with_gradients(arguments, *, initial_state=None, **options):
    """[h, the last h and c / n, and gradients of everything for random gradients of these]."""
    out, (h, c, n, _) = slstm(*arguments, initial_state=initial_state, return_state=True, **options)
    ends, leaves = [out, h, c / n], [*arguments, *(initial_state or ())]
    weights = [random(*z.shape, seed=9, dtype=z.dtype) for z in ends]
    return [*ends, *torch.autograd.grad(ends, leaves, weights)]


def test_backends_share_the_signature():
    expected = inspect.signature(slstm).parameters
    plain = [p for name, p in expected.items() if name != "backend"]
    assert list(inspect.signature(reference).parameters.values()) == plain
    assert list(inspect.signature(loop).parameters.values()) == plain
    assert list(inspect.signature(persistent).parameters.values()) == plain


@pytest.mark.parametrize("forget_gate", FORGET_GATES)
def test_reference_is_the_definition(forget_gate):
    """The stabilised loop against exponentials as they are, eq. 8-14."""
    tokens = 12
    x, r = inputs(tokens)
    ids = documents(tokens, 0.3)
    got, _ = slstm(x, r, forget_gate=forget_gate, doc_ids_BT=ids, backend="reference")
    for b in range(B):
        for a in range(H):
            for t in range(tokens):
                if t == 0 or ids[b, t] != ids[b, t - 1]:
                    h = c = n = torch.zeros(V, dtype=torch.float64)
                z, i, f, o = (x[b, t, a] + h @ r[a]).chunk(4)
                f = f.sigmoid() if forget_gate == "sigmoid" else f.exp()
                c, n = f * c + i.exp() * z.tanh(), f * n + i.exp()
                h = o.sigmoid() * c / n
                torch.testing.assert_close(got[b, t, a], h, **EXACT)


@pytest.mark.parametrize("tokens", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
@pytest.mark.parametrize("forget_gate", FORGET_GATES)
def test_loop_is_autograd_of_the_reference(tokens, start, forget_gate):
    options = {"forget_gate": forget_gate}
    if start == "documents":
        options["doc_ids_BT"] = documents(tokens)
    if start == "state":
        options["initial_state"] = states()
    got = with_gradients(inputs(tokens), backend="loop", **options)
    expected = with_gradients(inputs(tokens), backend="reference", **options)
    torch.testing.assert_close(got, expected, **EXACT)


def test_the_last_state_is_the_references():
    for options in ({}, {"doc_ids_BT": documents(30)}, {"initial_state": states()}):
        (_, got), (_, expected) = (
            slstm(*inputs(30), return_state=True, backend=name, **options)
            for name in ("loop", "reference")
        )
        torch.testing.assert_close(got, expected, **EXACT)
        with torch.no_grad():
            _, unsaved = slstm(*inputs(30), return_state=True, **options)
        torch.testing.assert_close(unsaved, got, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 16, 37])
def test_a_prefix_may_be_split(cut):
    """With gradients: what m does not hand on, c and n do not miss."""
    x, r = inputs(50)
    first, state = slstm(x[:, :cut], r, return_state=True)
    second, (h, c, n, _) = slstm(x[:, cut:], r, initial_state=state, return_state=True)
    ends = [torch.cat([first, second], dim=1), h, c / n]
    weights = [random(*z.shape, seed=9) for z in ends]
    got = [*ends, *torch.autograd.grad(ends, (x, r), weights)]
    torch.testing.assert_close(got, with_gradients([x, r]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["loop", "reference"])
@pytest.mark.parametrize("forget_gate", FORGET_GATES)
def test_gates_of_any_size(dtype, backend, forget_gate):
    """Values and gradients are finite."""
    tokens, generator = 60, torch.Generator().manual_seed(5)
    for values in (EXTREME, EXTREME[:2], EXTREME[-2:]):
        which = torch.randint(len(values), (B, tokens, H, 4 * V), generator=generator)
        x, r = values[which].to(dtype).requires_grad_(), inputs(1, dtype=dtype)[1]
        out, state = slstm(x, r, forget_gate=forget_gate, return_state=True, backend=backend)
        got = torch.autograd.grad(out.float().sum(), (x, r))
        assert all(z.isfinite().all() for z in (out, *state, *got))


@pytest.mark.parametrize("forget_gate", FORGET_GATES)
def test_precision_over_many_tokens(forget_gate):
    """2048 tokens in float32, gradients too; forget gates near 1, where memory reaches far."""
    x, r = inputs(2048)
    with torch.no_grad():
        x[..., 2 * V : 3 * V] += 6.0 if forget_gate == "sigmoid" else -1.0
    expected = with_gradients([x, r], forget_gate=forget_gate)
    low = [z.detach().float().requires_grad_() for z in (x, r)]
    for got, exact in zip(with_gradients(low, forget_gate=forget_gate), expected, strict=True):
        assert (got.double() - exact).norm() / exact.norm() < 1e-5


FREE = ("select", "slice", "unbind", "view", "unsqueeze", "transpose", "empty", "unflatten")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("forget_gate", "forward"), [("sigmoid", 11), ("exp", 12)])
def test_launches_a_token(forget_gate, forward, packed):
    """What the two operators call that computes; one more each with documents."""

    def count(tokens):
        options = {"forget_gate": forget_gate}
        options["doc_ids_BT"] = documents(tokens) if packed else None
        with profile() as record:
            with torch.no_grad():
                slstm(*inputs(tokens), **options)
            slstm(*inputs(tokens), **options)[0].sum().backward()
        calls = [e for e in record.function_events if e.cpu_parent is not None]
        return [
            sum(
                e.cpu_parent.name == f"llmtrain::slstm_{name}"
                and not e.name.removeprefix("aten::").startswith(FREE)
                for e in calls
            )
            for name in ("forward", "backward")
        ]

    short, long = count(10), count(30)
    assert [(b - a) / 20 for a, b in zip(short, long)] == [forward + packed, 7 + packed]


def test_operators_are_registered_soundly():
    """Schema, fake implementation, autograd registration and tracing of the forward operator."""
    x = random(5, H, B, 4 * V, seed=0).requires_grad_()
    r, state = inputs(1)[1], random(4, H, B, V, seed=3).abs().requires_grad_()
    for keep in (None, torch.ones(5, B, dtype=torch.float64)):
        torch.library.opcheck(torch.ops.llmtrain.slstm_forward, (x, r, state, keep, False, True))


def test_cost_is_what_the_loop_multiplies():
    x, r = (z.detach() for z in inputs(9))
    with FlopCounterMode(display=False) as counter:
        slstm(x, r, backend="reference")
    forward, backward = cost(9 * B, heads=H, v_width=V, dtype=torch.bfloat16)
    assert forward.flops == counter.get_total_flops()
    assert backward.flops == 2 * forward.flops


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("cuda", torch.bfloat16, 128), None),
        (("cuda", torch.float32, 16), None),
        (("cuda", torch.float64, 64), "they take float32, bfloat16 and float16, not float64"),
        (("cuda", torch.float32, 48), "they take heads of width 16, 32, 64, 128, not 48"),
        (("cpu", torch.float32, 64), "they run on cuda, not cpu"),
    ],
)
def test_where_the_kernels_can_run(monkeypatch, case, reason):
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert op.unsupported(*case) == reason
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", False)
    assert op.unsupported(*case) == "triton is not installed; pip install triton"
    with pytest.raises(ValueError, match=r"backend='triton'.*triton is not installed; pip install"):
        select_backend("triton", *case)


def test_auto_takes_the_kernels_on_a_gpu_alone_and_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    op.triton_backend.automatic.cache_clear()
    for _ in range(2):
        assert select_backend("auto", "cuda", torch.bfloat16, 64) == "triton"
        assert select_backend("auto", "cuda", torch.float32, 48) == "loop"
        assert select_backend("auto", "cpu", torch.float32, 64) == "loop"
    found = [(record.levelname, record.message) for record in caplog.records]
    assert found == [
        ("INFO", "slstm: triton on cuda (fused)"),
        ("WARNING", "slstm: loop on cuda (they take heads of width 16, 32, 64, 128, not 48)"),
        ("INFO", "slstm: loop on cpu (they run on cuda, not cpu)"),
    ]
    op.triton_backend.automatic.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backend": "chunked"},
            "slstm: got backend='chunked', expected auto or one of triton, loop",
        ),
        ({"forget_gate": "relu"}, "slstm: got forget_gate='relu', expected one of sigmoid, exp"),
        ({"initial_state": ()}, r"slstm: got an initial state \[\], expected"),
        (
            {"initial_state": (), "doc_ids_BT": torch.zeros(B, 4, dtype=torch.int32)},
            "slstm: got an initial state together with documents, expected one of them",
        ),
    ],
)
def test_messages(changes, message):
    x, r = inputs(4)
    with pytest.raises(ValueError, match=message):
        slstm(x, r, **changes)
    with pytest.raises(ValueError, match=r"slstm: got x .* expected \[B, T, H, 4 V\]"):
        slstm(x, r[:, 1:])
