"""The Triton kernels of linear_cross_entropy: in the interpreter on a CPU, compiled for a GPU that
need not be there, and on a GPU."""

import tomllib

import pytest
import torch
from llmtrain_kernels.launch import FOLDER
from llmtrain_kernels.linear_cross_entropy import linear_cross_entropy
from llmtrain_kernels.linear_cross_entropy.chunked import (
    rows_by_torch,
    rows_by_triton,
    scale_by_triton,
)
from offline import (
    DEVICE,
    INTERPRETED,
    TABLES,
    compile_for_hopper,
    hosts,
    run_in_interpreter,
    runs,
)

pytest.importorskip("triton")

SIZES = [(1, 16, 24, 24), (5, 8, 300, 270), (6, 8, 1100, 1100)]  # N, D, O, tokens
SIZES += [] if INTERPRETED else [(300, 64, 50304, 50257), (129, 128, 128256, 128256)]
KNOBS = [
    {},
    {"z_loss": 0.1},
    {"softcap": 3.0, "z_loss": 0.1},
    {"chunk_rows": 2, "expected_gradient": 0.25},
    {"chunk_rows": 4, "ignore_index": 3},
]
CONFIGS = [
    {"block": 64, "num_warps": 1, "stages": 1},
    {"block": 512, "num_warps": 1, "stages": 2},
    {"block": 2048, "num_warps": 2, "stages": 1},
]


def inputs(rows, width, columns, tokens, ignored=-100):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = 3 * width**-0.5 * torch.randn(columns, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(tokens, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    if rows > 4:
        targets[2], weights[4] = ignored, 0
    return [z.to(DEVICE) for z in (x, weight, targets, weights)]


def with_gradients(tensors, dtype, weight_dtype=None, upstream=0.25, **options):
    """[loss, ce_sum, lse_square_sum, dx, dW] for a loss multiplied by upstream."""
    x, weight, targets, weights = tensors
    dtypes = dtype, weight_dtype or dtype
    leaves = [z.to(d).detach().requires_grad_() for z, d in zip((x, weight), dtypes)]
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    out = linear_cross_entropy(*leaves, targets, weights, **options)
    return [*out, *torch.autograd.grad(out.loss * upstream, leaves)]


def errors(got, expected):
    pairs = zip(got, expected, strict=True)
    return [((a.double() - b).norm() / (b.norm() or 1.0)).item() for a, b in pairs]


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated is full of nan."""

    def poison(made):
        return made.fill_(torch.nan) if made.is_floating_point() else made

    for name in ("new_empty",):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, p=plain, **k: poison(p(*a, **k)))
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, p=plain, **k: poison(p(*a, **k)))


@pytest.mark.slow
@hosts
def test_in_the_interpreter():
    run_in_interpreter(__file__, at_least=25)


@runs
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("sizes", SIZES)
def test_as_precise_as_the_reference_in_float32(sizes, knobs, poisoned):
    tokens = sizes[3]
    tensors = inputs(*sizes, ignored=knobs.get("ignore_index", -100))
    own = {k: v for k, v in knobs.items() if k not in ("chunk_rows", "expected_gradient")}
    plain = {"vocab_size": tokens, "backend": "reference", **own}
    exact = with_gradients(tensors, torch.float64, **plain)
    torchs = with_gradients(tensors, torch.float32, **plain)
    got = with_gradients(tensors, torch.float32, vocab_size=tokens, backend="triton", **knobs)
    for mine, theirs in zip(errors(got, exact), errors(torchs, exact), strict=True):
        assert mine < 2 * theirs + 5e-7
    assert (got[4][tokens:] == 0).all()


def rows(columns, stride, spread=1.0, seed=0):
    """Six rows of logits, targets and weights; columns beyond those that count are nan."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((6, stride), torch.nan)
    logits[:, :columns] = spread * torch.randn(6, columns, generator=generator)
    targets = torch.tensor([0, columns - 1, -100, columns // 2, 1, 0])
    weights = torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0, 1e-6])
    return [z.to(DEVICE) for z in (logits, targets, weights)]


def both(logits, targets, weights, config, **options):
    """(sums, what became of the logits) of the kernel and of torch."""
    options = {"z_loss": 0.0, "softcap": None, "ignore_index": -100, "expected": 1.0, **options}
    results = []
    for step, more in ((rows_by_triton, {"config": config}), (rows_by_torch, {})):
        sums = torch.full((2, 6), torch.nan, device=DEVICE)
        given = logits.clone()
        step(given, targets, weights, sums, **options, **more)
        results.append((sums, given))
    return results


@runs
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_in_blocks_of_any_size(config):
    """A row over several blocks, a block and a part, and fewer columns than lanes."""
    for columns, stride in ((576, 576), (577, 640), (70, 128), (1, 64)):
        tensors = rows(columns, stride)
        for weights in (tensors[2], None):
            options = {"z_loss": 0.1, "vocab_size": columns, "expected": 0.5}
            (sums, made), (true_sums, expected) = both(*tensors[:2], weights, config, **options)
            # of one column, the second is out of range
            torch.testing.assert_close(sums, true_sums, rtol=2e-6, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(made, expected, rtol=2e-5, atol=1e-9)


@runs
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_any_size(softcap):
    """Equal, far apart, all very low, very high."""
    config = CONFIGS[1]
    for spread, shift in ((0.0, 0.0), (1e4, 0.0), (1.0, -1e3), (1.0, 1e3), (0.0, 1e30)):
        logits, targets, weights = rows(577, 640, spread)
        (sums, made), (true_sums, expected) = both(
            logits + shift, targets, weights, config, softcap=softcap, vocab_size=577
        )
        assert made.isfinite().all()
        if shift == 1e30 and softcap is None:  # lost in torch's difference of two sums, not in ours
            shifted = true_sums
            _, (true_sums, expected) = both(logits, targets, weights, config, vocab_size=577)
            true_sums[1] = shifted[1]
        # a rounding of the largest logit, in ce and as a relative one of probabilities
        rounding = 5e-7 * max(logits.abs().nan_to_num().max().item(), shift if shift < 1e9 else 0)
        torch.testing.assert_close(sums, true_sums, rtol=1e-5, atol=1e-5 + rounding)
        torch.testing.assert_close(made, expected, rtol=1e-4 + 2 * rounding, atol=1e-6)


@runs
def test_what_is_not_finite_shows_in_the_sums():
    logits, targets, weights = rows(577, 640)
    logits[0, 5], logits[1, 576], logits[2, 7], logits[4, 8] = torch.nan, torch.inf, torch.nan, 0
    ((ce, _), made), _ = both(logits, targets, weights, CONFIGS[1], vocab_size=577)
    assert ce.isfinite().tolist() == [False, False, True, True, True, True]
    assert (made[2] == 0).all()  # ignored
    assert (made[4] == 0).all()  # weighs nothing


@runs
@pytest.mark.parametrize("target", [577, 640, 10**9, 2**40, -1, -(2**40)])
def test_targets_out_of_range_are_loud_and_read_nothing(target):
    logits, targets, weights = rows(577, 640)
    targets[0] = target
    (sums, made), (true_sums, expected) = both(logits, targets, weights, CONFIGS[1], vocab_size=577)
    assert sums[0].isnan().tolist() == [True] + [False] * 5
    torch.testing.assert_close(sums, true_sums, rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=1e-9)


@runs
def test_sums_alone_leave_the_logits():
    logits, targets, weights = rows(577, 640)
    (sums, made), (true_sums, _) = both(
        logits, targets, weights, CONFIGS[0], vocab_size=577, expected=None
    )
    torch.testing.assert_close(made, logits, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(sums, true_sums, rtol=2e-6, atol=1e-6)


@runs
def test_gradients_are_multiplied_only_for_another_upstream():
    values = torch.randn(1000, device=DEVICE)
    for upstream, expected in ((0.5, 0.25), (1.0, 1.0), (-1.0, 1.0), (0.0, 0.1)):
        given = values.clone()
        config = {"block": 128, "num_warps": 1}
        scale_by_triton(given, torch.tensor(upstream, device=DEVICE), expected, config=config)
        torch.testing.assert_close(given, values * (upstream / expected), rtol=1e-6, atol=0)
    near = torch.tensor(0.1, device=DEVICE)
    given = values.clone()
    scale_by_triton(given, near * (1 + 1e-7), 0.1, config=config)
    assert torch.equal(given, values)


@runs
def test_a_second_backward_pass_is_refused():
    """The first has changed in place what is kept."""
    x, weight, targets, _ = inputs(5, 8, 300, 270)
    leaves = [z.float().requires_grad_() for z in (x, weight)]
    loss = linear_cross_entropy(*leaves, targets, backend="triton").loss
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@runs
def test_operators_are_registered_soundly():
    x, weight, targets, weights = inputs(5, 8, 300, 270)
    leaves = [z.float().requires_grad_() for z in (x, weight)]
    knobs = (0.1, None, -100, 270, 4, 1.0, True, True, True, True)
    operator = torch.ops.llmtrain.linear_cross_entropy
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*leaves, targets, weights.float(), *knobs), test_utils=tests)
    scaled = [torch.ones(3, 4, device=DEVICE), torch.ones(5, device=DEVICE)]
    torch.library.opcheck(
        torch.ops.llmtrain.linear_cross_entropy_scale,
        (*scaled, torch.tensor(2.0, device=DEVICE), 1.0),
        test_utils=tests,
    )


@runs
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_compiles_as_one_graph(upstream):
    x, weight, targets, weights = inputs(5, 8, 300, 270)

    def step(x, weight, targets, weights):
        out = linear_cross_entropy(
            x, weight, targets, weights, vocab_size=270, chunk_rows=4, backend="triton"
        )
        return out.loss * upstream

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaves = [z.detach().float().requires_grad_() for z in (x, weight)]
        loss = call(*leaves, targets, weights.float())
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@hosts
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("device", TABLES)
def test_registers_suffice(device, capped, dtype):
    """Every pinned entry: nothing spilled, 16 bytes a load and a store, threads exchange twice a
    row (the maximum and the sum, two barriers each, and one before)."""
    from llmtrain_kernels.linear_cross_entropy.kernels import linear_cross_entropy_fwd_kernel

    entries = tomllib.loads((FOLDER / f"{device}.toml").read_text())["linear_cross_entropy_fwd"]
    names = {"p_logits": dtype, "p_targets": "*i64", "p_weights": "*fp32", "p_sums": "*fp32"}
    numbers = dict.fromkeys(("z_loss", "softcap", "expected"), "fp32")
    sizes = dict.fromkeys(("vocab", "stride", "sums_stride", "ignore_index"), "i32")
    for entry in entries:
        lanes = min(32 * entry["num_warps"] * 8, entry["block"])
        constants = {"WEIGHTED": True, "CAPPED": capped, "GRADIENT": True, "LANES": lanes}
        constants |= {"SUB": entry["block"] // lanes, "STAGES": entry["stages"]}
        facts = compile_for_hopper(
            linear_cross_entropy_fwd_kernel,
            {**names, **numbers, **sizes},
            constants,
            num_warps=entry["num_warps"],
            divisible=("stride",),
        )
        assert facts.spilled == 0
        assert facts.registers * 32 * entry["num_warps"] <= 65536
        assert "ld.global.v4.b32" in facts.ptx or "cp.async.cg" in facts.ptx
        assert "st.global.v4.b32" in facts.ptx
        assert entry["stages"] > 1 or facts.ptx.count("bar.sync") <= 5


@hosts
@pytest.mark.parametrize("index", ["*i64", "*i32"])
def test_variants_compile(index):
    """Without weights, without a gradient, with targets of either size."""
    from llmtrain_kernels.linear_cross_entropy.kernels import linear_cross_entropy_fwd_kernel

    types = {"p_logits": "*bf16", "p_targets": index, "p_sums": "*fp32"}
    types |= dict.fromkeys(("z_loss", "softcap", "expected"), "fp32")
    types |= dict.fromkeys(("vocab", "stride", "sums_stride", "ignore_index"), "i32")
    for gradient in (False, True):
        constants = {"p_weights": None, "WEIGHTED": False, "CAPPED": False, "GRADIENT": gradient}
        constants |= {"SUB": 2, "LANES": 2048, "STAGES": 1}
        facts = compile_for_hopper(
            linear_cross_entropy_fwd_kernel, types, constants, num_warps=8, divisible=("stride",)
        )
        assert facts.spilled == 0
        assert ("st.global.v4.b32" in facts.ptx) == gradient


@hosts
def test_scaling_reads_and_writes_16_bytes():
    from llmtrain_kernels.linear_cross_entropy.kernels import linear_cross_entropy_bwd_kernel

    for dtype in ("*bf16", "*fp32"):
        facts = compile_for_hopper(
            linear_cross_entropy_bwd_kernel,
            {"p_gradient": dtype, "p_upstream": "*fp32", "size": "i32", "expected": "fp32"},
            {"PROGRAMS": 1056, "BLOCK": 4096},
            num_warps=8,
            divisible=("size",),
        )
        assert facts.spilled == 0
        assert "ld.global.v4.b32" in facts.ptx
        assert "st.global.v4.b32" in facts.ptx


# On a GPU.

WIDE = (2000, 256, 32064, 32000)


@pytest.mark.gpu
@hosts
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("knobs", KNOBS[:3])
def test_bfloat16_is_as_precise_as_torchs_formula(weight_dtype, knobs):
    tensors = inputs(*WIDE)
    for k in (0, 1):
        tensors[k] = tensors[k].to((torch.bfloat16, weight_dtype)[k]).double()
    tensors[1][:] = tensors[1].bfloat16().double()
    options = {"vocab_size": WIDE[3], **knobs}
    exact = with_gradients(tensors, torch.float64, backend="chunked", **options)
    torchs = with_gradients(tensors, torch.bfloat16, weight_dtype, backend="reference", **options)
    got = with_gradients(
        tensors, torch.bfloat16, weight_dtype, chunk_rows=512, expected_gradient=0.25, **options
    )
    for mine, theirs in zip(errors(got, exact), errors(torchs, exact), strict=True):
        assert mine <= 1.1 * theirs + 1e-5  # sums are off by chance, and less than that


@pytest.mark.gpu
@hosts
def test_the_same_bits_twice():
    tensors = inputs(*WIDE)
    one, two = (
        with_gradients(tensors, torch.bfloat16, torch.float32, chunk_rows=512) for _ in range(2)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.gpu
@hosts
def test_a_graph_can_be_captured():
    """So nothing waits for the device."""
    x, weight, targets, weights = inputs(*WIDE)
    leaves = [x.bfloat16().requires_grad_(), weight.float().requires_grad_()]

    def step():
        out = linear_cross_entropy(*leaves, targets, weights, vocab_size=WIDE[3], chunk_rows=512)
        return [out.loss, *torch.autograd.grad(out.loss * 0.5, leaves)]

    expected = [z.detach().clone() for z in step()]  # a kept graph would hold its stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.testing.assert_close(
        [z.detach() for z in got], [z.detach() for z in expected], rtol=0, atol=0
    )


@pytest.mark.gpu
@hosts
def test_inductor_takes_it_as_one_graph():
    x, weight, targets, weights = inputs(*WIDE)

    def step(x, weight, targets, weights):
        return linear_cross_entropy(x, weight, targets, weights, vocab_size=WIDE[3]).loss * 0.5

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        leaves = [x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()]
        loss = call(*leaves, targets, weights.float())
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@hosts
def test_extra_memory():
    """N16384 D2048 V128256 in bfloat16 takes less than 300 MiB beside inputs and gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(16384, 2048, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(128256, 2048, device="cuda", generator=generator) * 0.02
    weight = weight.bfloat16().requires_grad_()
    targets = torch.randint(128256, (16384,), device="cuda", generator=generator)
    for _ in range(2):  # the library's workspace is made once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = linear_cross_entropy(x, weight, targets, wide_sum=False)
        kept = torch.autograd.grad(out.loss, (x, weight))
        torch.cuda.synchronize()
        del out
    extra = torch.cuda.max_memory_allocated() - before - sum(z.nbytes for z in kept)
    assert extra <= 300 * 2**20
