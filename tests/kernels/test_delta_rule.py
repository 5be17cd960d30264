"""The chunked gated delta rule against its definition, a loop over tokens in float64."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels.delta_rule import cost, gated_delta_rule, reference
from llmtrain_kernels.delta_rule.triangular import unit_lower_inverse
from torch.utils.flop_counter import FlopCounterMode

B, G, H, K, V = 2, 2, 4, 6, 5
EXACT = {"rtol": 1e-9, "atol": 1e-9}
EXTREME = [-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38]  # of gates before their activations


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(low, high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def inputs(tokens, *, batch=B, groups=G, heads=H, width=K, spread=None, beta=(0.0, 2.0), gate=-0.3):
    """q, k, v, g, beta in float64. spread: None for independent keys, else how far they are from
    one common direction."""
    k_BTGK = noise(batch, tokens, groups, width, seed=1)
    if spread is not None:
        k_BTGK = noise(1, 1, groups, width, seed=6) + spread * k_BTGK
    return [
        F.normalize(noise(batch, tokens, groups, width, seed=2), dim=-1),
        F.normalize(k_BTGK, dim=-1),
        noise(batch, tokens, heads, V if width == K else width, seed=3),
        uniform(gate, 0.0, batch, tokens, heads, seed=4),
        uniform(*beta, batch, tokens, heads, seed=5),
    ]


def document_ids(tokens, batch=B):
    """Documents of 9 tokens on average, one-token ones and long ones among them."""
    return (uniform(0, 1, batch, tokens, seed=7) < 1 / 9).cumsum(dim=1).int()


def outcome(arguments, **options):
    """o, the last state, and the gradients of a sum over both for every tensor that has one."""
    leaves = [z.detach().clone().requires_grad_() for z in arguments if z is not None]
    keys = iter(leaves)
    given = [None if z is None else next(keys) for z in arguments]
    state = options.pop("initial_state_BHKV", None)
    if state is not None:
        leaves.append(state.detach().clone().requires_grad_())
        options["initial_state_BHKV"] = leaves[-1]
    o_BTHV, last_BHKV = gated_delta_rule(*given, return_state=True, **options)
    loss = (o_BTHV * noise(*o_BTHV.shape, seed=8).to(o_BTHV.dtype)).sum().double()
    loss = loss + (last_BHKV * noise(*last_BHKV.shape, seed=9)).sum()
    return [o_BTHV, last_BHKV, *torch.autograd.grad(loss, leaves)]


def both(arguments, **options):
    """(chunked, loop)"""
    chunk = {"chunk": options.pop("chunk")} if "chunk" in options else {}
    return (
        outcome(arguments, backend="chunked", **chunk, **options),
        outcome(arguments, backend="reference", **options),
    )


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_chunks_are_the_loop(tokens):
    state = noise(B, H, K, V, seed=10)
    got, expected = both(inputs(tokens), initial_state_BHKV=state)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130, 400])
def test_documents(tokens):
    got, expected = both(inputs(tokens), doc_ids_BT=document_ids(tokens))
    torch.testing.assert_close(got, expected, **EXACT)


def test_documents_as_if_alone():
    tokens, ids_BT = 150, document_ids(150, batch=1)
    arguments = inputs(tokens, batch=1)
    o_BTHV, last_BHKV = gated_delta_rule(*arguments, doc_ids_BT=ids_BT, return_state=True)
    for document in ids_BT.unique():
        where = (ids_BT[0] == document).nonzero().flatten()
        alone = [z[:, where] for z in arguments]
        expected_BTHV, state_BHKV = gated_delta_rule(*alone, return_state=True)
        torch.testing.assert_close(o_BTHV[:, where], expected_BTHV, **EXACT)
    torch.testing.assert_close(last_BHKV, state_BHKV, **EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 16, 64, 128, 256])
def test_any_chunk(chunk):
    got, expected = both(inputs(150), chunk=chunk, doc_ids_BT=document_ids(150))
    torch.testing.assert_close(got, expected, **EXACT)


def test_no_decay_no_state_own_scale():
    q, k, v, _, beta = inputs(70)
    got, expected = both([q, k, v, None, beta], scale=0.7)
    torch.testing.assert_close(got, expected, **EXACT)
    zeros = outcome([q, k, v, torch.zeros_like(beta), beta], scale=0.7)
    torch.testing.assert_close(got, [z for i, z in enumerate(zeros) if i != 5], **EXACT)


def test_definition():
    """One head by hand: S <- e^g (I - beta k k^T) S + beta k v^T, o = scale q^T S."""
    q, k, v, g, beta = inputs(5, batch=1, groups=1, heads=1)
    S_KV, outputs = torch.zeros(K, V, dtype=torch.float64), []
    for t in range(5):
        key, value, rate = k[0, t, 0], v[0, t, 0], beta[0, t, 0]
        erase = torch.eye(K, dtype=torch.float64) - rate * torch.outer(key, key)
        S_KV = g[0, t, 0].exp() * erase @ S_KV + rate * torch.outer(key, value)
        outputs.append(q[0, t, 0] @ S_KV / K**0.5)
    for backend in ("chunked", "reference"):
        o_BTHV, last_BHKV = gated_delta_rule(q, k, v, g, beta, return_state=True, backend=backend)
        torch.testing.assert_close(o_BTHV[0, :, 0], torch.stack(outputs), **EXACT)
        torch.testing.assert_close(last_BHKV[0, 0], S_KV, **EXACT)


def test_layout_of_inputs_does_not_matter():
    arguments = inputs(70)
    turned = [z.transpose(0, 1).contiguous().transpose(0, 1) for z in arguments]
    expected, got = outcome(arguments), outcome(turned)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_a_state_continues_the_row(cut):
    arguments = inputs(130)
    whole_BTHV, last_BHKV = gated_delta_rule(*arguments, return_state=True)
    first, state = gated_delta_rule(*[z[:, :cut] for z in arguments], return_state=True)
    rest, end = gated_delta_rule(
        *[z[:, cut:] for z in arguments], initial_state_BHKV=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole_BTHV, **EXACT)
    torch.testing.assert_close(end, last_BHKV, **EXACT)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_any_size(dtype, backend):
    """Pre-activations over bfloat16's range: finite, with finite gradients, and near float64."""
    tokens = 131
    q, k, v = (z.to(dtype).requires_grad_() for z in inputs(tokens)[:3])
    pick = torch.Generator().manual_seed(11)
    a_BTH, b_BTH = (
        torch.tensor(EXTREME)[torch.randint(7, (B, tokens, H), generator=pick)].requires_grad_()
        for _ in range(2)
    )
    A_log_H = torch.full((H,), 2.7, requires_grad=True)
    g_BTH, beta_BTH = -A_log_H.exp() * F.softplus(a_BTH), 2 * b_BTH.sigmoid()
    o_BTHV, state = gated_delta_rule(q, k, v, g_BTH, beta_BTH, return_state=True, backend=backend)
    leaves = [q, k, v, a_BTH, b_BTH, A_log_H]
    found = torch.autograd.grad(o_BTHV.float().sum() + state.sum(), leaves)
    assert all(z.isfinite().all() for z in (o_BTHV, state, *found))
    exact = [z.detach().double() for z in (q, k, v, g_BTH, beta_BTH)]
    expected_BTHV, expected = gated_delta_rule(*exact, return_state=True, backend="reference")
    assert relative(o_BTHV, expected_BTHV) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert relative(state, expected) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_decay_after_a_strong_one_is_exact():
    """Gates summed in float32 would lose the small ones that follow a large one."""
    q, k, v, g, beta = inputs(64)
    g[:, ::5] = -900.0
    low = [z.float() for z in (q, k, v, g, beta)]
    got = gated_delta_rule(*low, backend="chunked")[0]
    expected = gated_delta_rule(*[z.double() for z in low], backend="reference")[0]
    assert relative(got, expected) < 5e-7


# keys' spread, beta, gate -> largest relative error of bfloat16 and of float32, over 8192 tokens
LONG = {
    "independent keys": (None, (0.0, 1.0), -0.1, 2.5e-3, 5e-7),
    "similar keys": (0.05, (0.9, 1.0), 0.0, 4e-3, 3e-6),
    "equal keys": (0.0, (0.95, 1.0), -0.01, 4e-3, 3e-6),
    "similar keys, beta near 2": (0.05, (1.9, 2.0), -0.01, 1.2e-2, 2e-5),
    "equal keys, beta near 2": (0.0, (1.95, 2.0), -0.01, 2e-2, 3e-5),
    "nothing is forgotten": (None, (1.9, 2.0), 0.0, 2.5e-2, 1e-5),
}


@torch.no_grad()
@pytest.mark.parametrize("case", LONG)
def test_long_rows_in_low_precision(case):
    """8192 tokens: an error that does not grow along the row, and little more than rounding the
    result, which is 1.7e-3 in bfloat16."""
    spread, beta, gate, bound, bound32 = LONG[case]
    sizes = {"batch": 1, "groups": 1, "heads": 2, "width": 32}
    q, k, v, g, b = inputs(8192, spread=spread, beta=beta, gate=gate, **sizes)
    q, k, v = (z.bfloat16() for z in (q, k, v))
    low = [q, k, v, g.float(), b.float()]
    exact_BTHV, exact = gated_delta_rule(
        *[z.double() for z in low], return_state=True, backend="reference"
    )
    o_BTHV, state = gated_delta_rule(*low, return_state=True)
    assert relative(o_BTHV, exact_BTHV) < bound
    assert relative(o_BTHV[:, -1024:], exact_BTHV[:, -1024:]) < 1.2 * bound
    assert relative(state, exact) < bound
    o_BTHV, state = gated_delta_rule(*[z.float() for z in low], return_state=True)
    assert relative(o_BTHV, exact_BTHV) < bound32
    assert relative(state, exact) < bound32


@pytest.mark.parametrize(
    ("spread", "beta", "factor"), [(None, (0.0, 2.0), 2.0), (0.05, (0.9, 1.0), 3.0)]
)
def test_gradients_in_bfloat16(spread, beta, factor):
    """dq, dk, dv within a small factor of what the loop itself rounds; gates' near float64's."""
    arguments = inputs(300, width=32, spread=spread, beta=beta, gate=-0.02)
    low = [z.bfloat16() for z in arguments[:3]] + [z.float() for z in arguments[3:]]
    exact = outcome([z.double() for z in low], backend="reference")
    loop, chunked = outcome(low, backend="reference"), outcome(low, backend="chunked")
    for i in range(2, 5):
        assert relative(chunked[i], exact[i]) < factor * relative(loop[i], exact[i])
    for i in range(5, 7):
        assert relative(chunked[i], exact[i]) < 1e-2


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_inverse_of_the_system(size):
    """Equal keys with beta = 2, where the powers of A reach 1e20, and random ones."""
    hard = torch.full((1, size, size), 2.0, dtype=torch.float64)
    for a in (hard, noise(3, 2, size, size) / size**0.5):
        expected = torch.linalg.inv(a.tril(-1) + torch.eye(size, dtype=torch.float64))
        torch.testing.assert_close(unit_lower_inverse(a), expected, **EXACT)
        assert relative(unit_lower_inverse(a.float()), expected) < 1e-5
    small = (noise(2, size, size) if size <= 8 else noise(1, 8, 8)).requires_grad_()
    assert torch.autograd.gradcheck(unit_lower_inverse, small)


def test_the_graph_does_not_grow_with_the_row():
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for tokens in (128, 1024):
        torch._dynamo.reset()
        run = torch.compile(gated_delta_rule, fullgraph=True, backend=count, dynamic=False)
        arguments = inputs(tokens)
        got, expected = run(*arguments)[0], gated_delta_rule(*arguments)[0]
        torch.testing.assert_close(got, expected, **EXACT)
    assert sizes[0] == sizes[1]


def test_signatures_are_the_same():
    public = dict(inspect.signature(gated_delta_rule).parameters)
    assert [public.pop(name).default for name in ("chunk", "backend")] == [64, "auto"]
    assert list(public.values()) == list(inspect.signature(reference.run).parameters.values())


def test_flops_are_those_counted():
    arguments = [z.requires_grad_() for z in inputs(17)]
    with FlopCounterMode(display=False) as forward:
        o_BTHV, _ = gated_delta_rule(*arguments, backend="reference")
    with FlopCounterMode(display=False) as backward:
        o_BTHV.sum().backward()
    sizes = {"heads": H, "groups": G, "k_width": K, "v_width": V, "dtype": torch.float64}
    expected = cost(B * 17, **sizes)
    assert expected[0].flops == forward.get_total_flops()
    assert expected[1].flops == backward.get_total_flops()
    assert expected[0].bytes_read == sum(z.numel() * z.itemsize for z in arguments)
    assert expected[0].bytes_written == o_BTHV.numel() * o_BTHV.itemsize
    assert expected[1].bytes_written == expected[0].bytes_read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "triton"}, r"backend='triton', expected auto or one of chunked, reference"),
        ({"chunk": 48}, r"chunk=48, expected a power of two"),
        ({"k_BTGK": noise(B, 9, G, K + 1)}, r"queries .* expected queries and keys of one shape"),
        ({"v_BTHV": noise(B, 9, 3, V)}, r"3 value heads, .* whose groups divide the heads"),
        ({"g_BTH": noise(B, 9, G)}, r"gates \(2, 9, 2\) for values .*one number a head"),
        ({"beta_BTH": noise(B, 8, H)}, r"beta \(2, 8, 4\) for values"),
        ({"initial_state_BHKV": noise(B, H, V, K)}, r"initial state \(2, 4, 5, 6\), expected"),
        (
            {"initial_state_BHKV": noise(B, H, K, V), "doc_ids_BT": document_ids(9)},
            r"initial state together with documents",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    names = ("q_BTGK", "k_BTGK", "v_BTHV", "g_BTH", "beta_BTH")
    arguments = {**dict(zip(names, inputs(9), strict=True)), **changes}
    with pytest.raises(ValueError, match=f"gated_delta_rule: got .*{message}"):
        gated_delta_rule(**arguments)
