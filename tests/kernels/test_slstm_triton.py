"""The sLSTM's Triton kernels: as Triton's interpreter runs them on a CPU (in a process of its own),
compiled for a GPU that need not be there, and on a GPU."""

from collections import defaultdict

import pytest
import torch
from llmtrain_kernels.slstm import slstm
from llmtrain_kernels.slstm.persistent import LOW, RESIDENT, WARPS, arranged, outer_products
from offline import DEVICE, INTERPRETED, compile_for_hopper, hosts, run_in_interpreter, runs

pytest.importorskip("triton")

LONG = 6 if INTERPRETED else 129
SHAPES = [(2, 1, 16), (3, LONG, 16), (17, 4, 32), (3, LONG, 64), (2, 3, 128)]  # B, T, V
SHAPES += [] if INTERPRETED else [(1, LONG, 32), (33, LONG, 64), (17, LONG, 128)]
# Tensor cores add 16 products at a time and cut the sum's last bits off instead of rounding
# (Ootomo and Yokota 2022, arXiv:2203.03341). A gradient of h is the sum of 4 V products, V / 4 such
# sums that lose 2^-25 of themselves or more on average. Gradients of the initial state come out of
# the last of them; what else there is averages over tokens.
CUT_OFF = 2.0**-27  # a V
STATE = 5  # where the initial state's gradients begin in what with_gradients() returns
EXTREME = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38])


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def inputs(batch, tokens, heads, width):
    """x and r of standard deviations 2 and 1 / sqrt(V)."""
    x = 2 * random(batch, tokens, heads, 4 * width, seed=0)
    return [x, random(heads, width, 4 * width, seed=1) * width**-0.5]


def states(batch, heads, width):
    h, c, n, m = (random(batch, heads, width, seed=s) for s in range(2, 6))
    return [h.tanh(), c, n.abs() + 0.5, m]


def documents(batch, tokens, share=0.2):
    starts = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens)) < share
    return starts.cumsum(dim=1, dtype=torch.int32).to(DEVICE)


def with_gradients(tensors, dtype, **options):
    """[h, the last h and c / n, and gradients of everything for random gradients of these].
    tensors: x, r, and those of the initial state if any."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in tensors]
    if len(leaves) > 2:
        options["initial_state"] = tuple(leaves[2:])
    out, (h, c, n, _) = slstm(*leaves[:2], return_state=True, **options)
    ends = [out, h, c / n]
    weights = [random(*z.shape, seed=9).to(dtype) for z in ends]
    return [*ends, *torch.autograd.grad(ends, leaves, weights)]


def errors(got, expected):
    """Frobenius norms, relative to those of what is expected (1 where that is zero)."""
    pairs = zip(got, expected, strict=True)
    return [((a.double() - b).norm() / (b.norm() or 1.0)).item() for a, b in pairs]


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=20)


@runs
@pytest.mark.parametrize("start", ["zero", "state", "documents"])
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_as_precise_as_the_reference_in_float32(batch, tokens, width, forget_gate, start):
    heads = 2
    tensors, options = inputs(batch, tokens, heads, width), {"forget_gate": forget_gate}
    if start == "documents":
        options["doc_ids_BT"] = documents(batch, tokens)
    if start == "state":
        tensors += states(batch, heads, width)
    exact = with_gradients(tensors, torch.float64, backend="reference", **options)
    plain = with_gradients(tensors, torch.float32, backend="reference", **options)
    got = with_gradients(tensors, torch.float32, backend="triton", **options)
    pairs = zip(errors(got, exact), errors(plain, exact), strict=True)
    for i, (mine, reference) in enumerate(pairs):
        # An initial state's gradient erred 2.9 times as much in one case of 62 on an H100.
        factor = 3 if i >= STATE else 2
        assert mine < factor * reference + 2e-7 + (CUT_OFF * width if i >= STATE else 0)


@runs
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_the_last_state_is_the_references(forget_gate):
    """All four numbers of it, with gradients wanted or not."""
    batch, tokens, heads, width = 2, LONG, 2, 16
    tensors = inputs(batch, tokens, heads, width)
    for options in (
        {},
        {"doc_ids_BT": documents(batch, tokens)},
        {"initial_state": states(batch, heads, width)},
    ):
        options["forget_gate"] = forget_gate
        out, expected = slstm(*tensors, return_state=True, backend="reference", **options)
        low = [z.float().requires_grad_() for z in tensors]
        for wanted in (True, False):
            with torch.set_grad_enabled(wanted):
                got = slstm(*low, return_state=True, backend="triton", **options)
            for mine, truth in zip((got[0], *got[1]), (out, *expected), strict=True):
                assert mine.dtype == torch.float32
                torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize("forget_gate", ["sigmoid", "exp"])
def test_gates_of_any_size(forget_gate):
    """All is finite, and h the loop's, as far as the rounding of 1e4 allows."""
    batch, tokens, heads, width = 2, LONG, 1, 16
    shape, generator = (batch, tokens, heads, 4 * width), torch.Generator().manual_seed(5)
    for values in (EXTREME, EXTREME[:2], EXTREME[-2:]):
        x = values[torch.randint(len(values), shape, generator=generator)].to(DEVICE)
        tensors = [x, inputs(1, 1, heads, width)[1]]
        got, expected = (
            with_gradients(tensors, torch.float32, backend=name, forget_gate=forget_gate)
            for name in ("triton", "loop")
        )
        assert all(z.isfinite().all() for z in got)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-2, atol=1e-2)


@runs
def test_dtypes_strides_and_small_weights():
    """bfloat16 in and out, x that is not contiguous, and weights that are zero, tiny or huge."""
    batch, tokens, heads, width = 2, 4, 2, 16
    x, r = inputs(batch, tokens, heads, width)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for scale in (0.0, 1e-30, 1e-3, 1e3):
        weights = (r * scale).float()
        got, expected = (
            slstm(turned.bfloat16(), weights, backend=name)[0] for name in ("triton", "loop")
        )
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@runs
def test_gradients_of_any_size():
    """Rows of gradients that are zero, tiny and huge, side by side and one after the other."""
    batch, tokens, heads, width = 4, 5, 1, 16
    x, r = inputs(batch, tokens, heads, width)
    sizes_B = torch.tensor([0.0, 1e-25, 1.0, 1e25], dtype=torch.float64, device=DEVICE)
    sizes_BT = torch.stack([sizes_B.roll(t) for t in range(tokens)], dim=1)
    weights = random(batch, tokens, heads, width, seed=8) * sizes_BT[..., None, None]
    results = []
    for name, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [z.detach().to(dtype).requires_grad_() for z in (x, r)]
        out, _ = slstm(*leaves, backend=name)
        results.append(torch.autograd.grad(out, leaves, weights.to(dtype))[0].double())
    expected, got = (z.permute(0, 1, 3, 2).flatten(2) for z in results)
    assert got.isfinite().all()
    assert ((got - expected).norm(dim=2) <= 1e-5 * expected.norm(dim=2)).all()


@runs
def test_operators_are_registered_soundly():
    """Schema, fake implementation, autograd registration and tracing of the forward operator."""
    x, r = (z.float().requires_grad_() for z in inputs(2, 3, 2, 16))
    state = torch.stack([z.float() for z in states(2, 2, 16)]).requires_grad_()
    for starts in (None, torch.zeros(2, 4, dtype=torch.bool, device=DEVICE)):
        operator = torch.ops.llmtrain.slstm_persistent_forward
        torch.library.opcheck(operator, (x, r, state, starts, False, True))


@runs
def test_compiles_as_one_graph():
    tensors = inputs(2, 4, 2, 16)

    def step(x, r, ids):
        return slstm(x, r, doc_ids_BT=ids, backend="triton")[0].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ids in (None, documents(2, 4)):
        results = []
        for call in (step, compiled):
            leaves = [z.detach().float().requires_grad_() for z in tensors]
            loss = call(*leaves, ids)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("width", [64, 128])
def test_over_many_tokens(width):
    """1000 tokens with forget gates near 1, and the same result twice."""
    tensors = inputs(5, 1000, 3, width)
    tensors[0][..., 2 * width : 3 * width] += 6.0
    exact = with_gradients(tensors, torch.float64, backend="loop")
    got, again = (with_gradients(tensors, torch.float32) for _ in range(2))
    assert max(errors(got, exact)) < 1e-5
    torch.testing.assert_close(got, again, rtol=0, atol=0)


@runs
def test_halves_are_22_bits():
    r = random(2, 4, 32, 32, seed=0).float()
    r[0] *= 1e-20
    packed, scale = arranged(r, 4)
    high, low = packed.float().flatten(3).unbind(2)
    whole = (high + low / LOW) * scale[:, None, None]
    for mine, given in zip(whole.unbind(0), r.unbind(0), strict=True):
        error = (mine.sort(dim=1).values - given.flatten(1).sort(dim=1).values).abs()
        assert error.max() < 2.0**-22 * given.abs().max()


@runs
@pytest.mark.parametrize("pairs", [(1, 7), (2, 512), (5, 300)])
def test_outer_products(pairs):
    before, dx = random(*pairs, 3, 4, seed=0), random(*pairs, 3, 16, seed=1)
    expected = torch.einsum("bthv,bthx->hvx", before, dx)
    torch.testing.assert_close(outer_products(before, dx), expected)


@hosts
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("width", "spills"), [(16, 0), (32, 0), (64, 0), (128, 32)])
def test_registers_suffice(width, spills, documents):
    """On an H100 the kernels keep what they work with in registers, but for a few addresses at
    V = 128, and threads exchange h alone, or the gradients of gates and their size: loads and
    stores have the layout of products. A barrier before an exchange, one in it."""
    from llmtrain_kernels.slstm.kernels import slstm_bwd_kernel, slstm_fwd_kernel

    forward = {"EXPONENTIAL": False, "SAVE": True}
    for kernel, barriers, options in ((slstm_fwd_kernel, 2, forward), (slstm_bwd_kernel, 11, {})):
        sizes = {"V": width, "W": WARPS[width], "RESIDENT": width <= RESIDENT}
        facts = compile_for_hopper(
            kernel,
            defaultdict(lambda: "*fp32", p_r="*fp16", p_starts="*i1", B="i32", T="i32", H="i32"),
            {**sizes, "DOCUMENTS": documents, **options},
            num_warps=WARPS[width],
        )
        assert facts.spilled <= spills
        assert facts.ptx.count("bar.sync") <= barriers
