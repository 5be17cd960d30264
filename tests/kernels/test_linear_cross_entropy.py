"""Head projection and cross entropy without logits: the definition, chunks, and what is said."""

import logging

import pytest
import torch
import torch.nn.functional as F
from llmtrain_kernels.linear_cross_entropy import (
    BACKENDS,
    cost,
    linear_cross_entropy,
    op,
    select_backend,
)
from llmtrain_kernels.linear_cross_entropy.chunked import product_in_parts
from llmtrain_kernels.linear_cross_entropy.chunks import (
    LOGITS_BYTES,
    logits_limit,
    most_rows,
    parts_of_sum,
    predicted_ms,
    row_stride,
    rows_per_chunk,
)
from torch.utils.flop_counter import FlopCounterMode

N, D, O, VOCAB = 13, 24, 72, 70  # noqa: E741
KNOBS = [
    {},
    {"z_loss": 0.1},
    {"softcap": 3.0},
    {"softcap": 3.0, "z_loss": 0.1},
    {"vocab_size": None},
    {"ignore_index": 2},
    {"chunk_rows": 1},
    {"chunk_rows": 5, "z_loss": 0.1},
    {"chunk_rows": 100},
    {"expected_gradient": 0.25},
    {"expected_gradient": 3.0},
]


def inputs(rows=N, dtype=torch.float64, ignored=-100):
    """x, weight, targets of which one is ignored, and weights of which one is zero."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(O, D, generator=generator, dtype=torch.float64) * D**-0.5
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    if rows > 5:
        targets[3], weights[5] = ignored, 0
    return x.to(dtype), weight.to(dtype), targets, weights.to(dtype)


def with_gradients(tensors, upstream=0.25, **options):
    """[loss, ce_sum, lse_square_sum, dx, dW] for a loss multiplied by upstream."""
    x, weight, targets, weights = tensors
    leaves = [z.detach().clone().requires_grad_() for z in (x, weight)]
    options = {"vocab_size": VOCAB, **options}
    out = linear_cross_entropy(*leaves, targets, weights, **options)
    return [*out, *torch.autograd.grad(out.loss * upstream, leaves)]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-13, rtol=1e-11)


def test_reference_is_torchs_cross_entropy():
    x, weight, targets, weights = inputs()
    logits = F.linear(x, weight)[:, :VOCAB]
    ce = F.cross_entropy(logits, targets, reduction="none")
    z = torch.where(targets == -100, 0, logits.logsumexp(1).square())
    out = linear_cross_entropy(
        x, weight, targets, weights, z_loss=0.1, vocab_size=VOCAB, backend="reference"
    )
    close(out.ce_sum, (weights * ce).sum())
    close(out.lse_square_sum, (weights * z).sum())
    close(out.loss, (weights * (ce + 0.1 * z)).sum())


@pytest.mark.parametrize("knobs", KNOBS)
def test_chunks_are_exact(knobs):
    chunk_free = {k: v for k, v in knobs.items() if k not in ("chunk_rows", "expected_gradient")}
    tensors = inputs(ignored=knobs.get("ignore_index", -100))
    expected = with_gradients(tensors, backend="reference", **chunk_free)
    close(with_gradients(tensors, backend="chunked", **knobs), expected)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradients_numerically(backend):
    x, weight, targets, weights = inputs(4)
    options = {"z_loss": 0.1, "softcap": 2.0, "vocab_size": VOCAB, "backend": backend}

    def loss(x, weight):
        return linear_cross_entropy(x, weight, targets, weights, chunk_rows=3, **options).loss

    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_padding_gets_no_probability_and_no_gradient(backend):
    x, weight, targets, weights = inputs()
    weight[VOCAB:] = 1e3
    *sums, dx, dw = with_gradients((x, weight, targets, weights), backend=backend)
    *other_sums, other_dx, other_dw = with_gradients(
        (x, weight[:VOCAB], targets, weights), backend=backend
    )
    close([*sums, dx, dw[:VOCAB]], [*other_sums, other_dx, other_dw])
    assert (dw[VOCAB:] == 0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("target", [VOCAB, O, 10**9, -1, -(10**9)])
def test_targets_out_of_range_are_loud(backend, target):
    x, weight, targets, weights = inputs()
    targets[1] = target
    out = linear_cross_entropy(x, weight, targets, weights, vocab_size=VOCAB, backend=backend)
    assert out.loss.isnan()
    assert out.lse_square_sum.isfinite()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_what_does_not_count_may_be_anything(backend):
    """Rows that are ignored or weigh nothing: neither their target nor their logits matter."""
    x, weight, targets, weights = inputs()
    expected = with_gradients((x, weight, targets, weights), backend=backend)
    targets[5] = 10**9
    close(with_gradients((x, weight, targets, weights), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide_sum", [True, False])
def test_low_precision_is_no_worse_than_torchs_formula(dtype, wide_sum):
    """bfloat16 activations over float32 and bfloat16 weights, in float32 all."""
    for weight_dtype in {dtype, torch.float32}:
        x, weight, targets, weights = inputs(300, dtype)
        tensors = x, weight.to(weight_dtype), targets, weights.float()
        exact = with_gradients([*(z.double() for z in tensors[:2]), targets, weights.double()])
        torchs = with_gradients(tensors, backend="reference")
        got = with_gradients(tensors, backend="chunked", chunk_rows=64, wide_sum=wide_sum)
        assert [z.dtype for z in got] == [*[torch.float32] * 3, dtype, weight_dtype]
        # sums in bfloat16 are rounded once a chunk
        allowed = 1.1 if wide_sum or weight_dtype == torch.float32 else 4
        for mine, theirs, true in zip(got, torchs, exact, strict=True):
            error, limit = ((z.double() - true).norm() for z in (mine, theirs))
            assert error <= allowed * limit + 1e-6 * true.norm()


def test_no_rows_and_no_gradients():
    x, weight, targets, weights = inputs()
    for backend in BACKENDS[1:]:
        got = with_gradients((x[:0], weight, targets[:0], weights[:0]), backend=backend)
        assert all((z == 0).all() for z in got)
        out = linear_cross_entropy(x, weight, targets, weights, vocab_size=VOCAB, backend=backend)
        assert not out.loss.requires_grad
        frozen = linear_cross_entropy(
            x.requires_grad_(), weight, targets, None, vocab_size=VOCAB, backend=backend
        )
        assert torch.autograd.grad(frozen.loss, x)[0].isfinite().all()
        assert not frozen.ce_sum.requires_grad
        x = x.detach()


def test_no_logits_are_kept():
    """Neither for the backward pass nor at any time all at once."""
    x, weight, targets, weights = inputs(64)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaves = x.requires_grad_(), weight.requires_grad_()
        linear_cross_entropy(*leaves, targets, weights, chunk_rows=8, backend="chunked")
    assert sorted(kept) == sorted([64 * D, O * D])


def test_a_second_backward_pass_is_right():
    x, weight, targets, weights = inputs()
    leaves = x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, targets, weights, vocab_size=VOCAB, backend="chunked").loss
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    close(torch.autograd.grad(loss * 3, leaves), first)


def test_recomputation_gives_the_same():
    from torch.utils.checkpoint import checkpoint

    expected = with_gradients(inputs(), backend="chunked")
    x, weight, targets, weights = inputs()
    leaves = x.requires_grad_(), weight.requires_grad_()

    def loss(x, weight):
        return linear_cross_entropy(x, weight, targets, weights, vocab_size=VOCAB).loss

    got = checkpoint(loss, *leaves, use_reentrant=False)
    close([got, *torch.autograd.grad(got * 0.25, leaves)], [expected[0], *expected[3:]])


def test_operator_is_registered_soundly():
    x, weight, targets, weights = inputs()
    operator = torch.ops.llmtrain.linear_cross_entropy
    for need, given in (((True, True), weights), ((False, True), None), ((False, False), weights)):
        leaves = [z.clone().requires_grad_(n) for z, n in zip((x, weight), need)]
        knobs = (0.1, 3.0, -100, VOCAB, 5, 1.0, True, *need, False)
        torch.library.opcheck(operator, (*leaves, targets, given, *knobs))


def test_compiles_as_one_graph():
    tensors = inputs(dtype=torch.float32)

    def step(x, weight, targets, weights):
        out = linear_cross_entropy(
            x, weight, targets, weights, z_loss=0.1, vocab_size=VOCAB, chunk_rows=5
        )
        return out.loss * 0.25, out.ce_sum

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        leaves = [z.clone().requires_grad_() for z in tensors[:2]]
        loss, ce_sum = call(*leaves, *tensors[2:])
        results.append([loss, ce_sum, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_cost_is_what_the_definition_multiplies():
    x, weight, targets, weights = inputs()
    forward, backward = cost(N, width=D, columns=O, dtype=torch.float64, weight_dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        out = linear_cross_entropy(x, weight, targets, weights, backend="reference")
    assert forward.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        got = with_gradients((x, weight, targets, weights), backend="reference")
    assert forward.flops + backward.flops == counter.get_total_flops()
    gradients = sum(z.nbytes for z in got[3:])
    assert forward.saved_bytes == backward.bytes_written == gradients
    low = cost(N, width=D, columns=O, dtype=torch.bfloat16, weight_dtype=torch.float32)[0]
    assert low.bytes_read == x.nbytes / 4 + weight.nbytes / 2 + N * 12
    assert out.loss.dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 100, 8192, 16384, 40000])
@pytest.mark.parametrize("columns", [50257, 32000, 128256])
def test_chunks_fit_and_are_equal(rows, columns):
    size = rows_per_chunk(rows, columns, 2)
    assert 1 <= size <= rows
    assert size * row_stride(columns) * 2 <= LOGITS_BYTES
    chunks = -(-rows // size)
    assert chunks == -(-rows // most_rows(columns, 2))
    assert chunks * size - rows < 128 * chunks
    assert row_stride(columns) - columns in range(64)
    assert rows_per_chunk(300, 10**9, 2) == 128  # one tile's, whatever the memory


def test_a_product_in_parts_is_the_product():
    d, low = torch.randn(5, 80)[:, :72].bfloat16(), torch.randn(72, 6).bfloat16()
    for parts in (1, 2, 3):
        got = product_in_parts(d, low, parts)
        torch.testing.assert_close(got, d.float() @ low.float())


def test_chunks_of_the_shapes_that_are_measured():
    found = [rows_per_chunk(n, v, 2) for n, v in ((8192, 32000), (16384, 128256), (8192, 128256))]
    assert found == [4096, 1024, 1024]
    limits = [logits_limit(v, d, 4) for d, v in ((2048, 32000), (2048, 128256), (4096, 128256))]
    assert limits == [LOGITS_BYTES, 128256 * 2048 * 2, 128256 * 4096 * 2]
    assert most_rows(128256, 2, limits[2]) == 4096
    assert logits_limit(128256, 4096, 2) == LOGITS_BYTES
    # 64 tiles leave half of an H100 idle, 128 and 256 do not
    assert parts_of_sum(1024, 2048, 128256, 132) == 2
    assert parts_of_sum(1024, 4096, 128256, 132) == 1
    assert parts_of_sum(4096, 2048, 32000, 132) == 1
    assert parts_of_sum(1024, 2048, 50257, 132) == 1  # not to be cut into equal parts


def test_predicted_times():
    """Fewer chunks are faster, and a sum of lower precision too; nothing is below its products."""
    shape = {"rows": 16384, "width": 2048, "columns": 128256}
    floor = 1e3 * 6 * 16384 * 2048 * 128256 / 700e12
    times = [predicted_ms(**shape, chunk_rows=c) for c in (16384, 4096, 1024)]
    assert floor < times[0] < times[1] < times[2] < 1.4 * floor
    assert predicted_ms(**shape, chunk_rows=1024, wide_sum=False) < times[2]
    assert predicted_ms(**shape, chunk_rows=1024, float32_weight=True) > times[2]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("cuda", torch.float64, torch.float32), "they take float32, bfloat16 and float16"),
        (("cpu", torch.float32, torch.float32), "they run on cuda, not cpu"),
    ],
)
def test_where_the_kernels_cannot_run(monkeypatch, case, reason):
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"got backend='triton'.*{reason}.*auto or chunked"):
        select_backend("triton", *case)


def test_auto_takes_the_kernels_on_a_gpu_alone_and_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(op.triton_backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    op.triton_backend.automatic.cache_clear()
    for _ in range(2):
        assert select_backend("auto", "cuda", torch.bfloat16, torch.float32) == "triton"
        assert select_backend("auto", "cpu", torch.float32, torch.float32) == "chunked"
    assert [record.message for record in caplog.records] == [
        "linear_cross_entropy: triton on cuda (fused)",
        "linear_cross_entropy: chunked on cpu (they run on cuda, not cpu)",
    ]
    op.triton_backend.automatic.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "loop"}, "got backend='loop', expected auto or one of triton, chunked, ref"),
        ({"weights_N": torch.ones(3)}, r"got targets \(13,\) and weights \(3,\) for x \(13, 24\)"),
        ({"targets_N": torch.ones(N, 2)}, r"got targets \(13, 2\) and weights none"),
        ({"vocab_size": O + 1}, "got vocab_size=73 for a weight of 72 rows, expected at least 1"),
        ({"vocab_size": 0}, "got vocab_size=0 for a weight of 72 rows"),
        ({"softcap": 0.0}, "got softcap=0.0, expected > 0 or None; set softcap"),
        ({"chunk_rows": -4}, "got chunk_rows=-4, expected > 0 or None; set chunk_rows"),
        ({"weight_OD": torch.ones(O, D + 1)}, r"got x \(13, 24\) and weight \(72, 25\)"),
    ],
)
def test_messages(changes, message):
    x, weight, targets, _ = inputs(dtype=torch.float32)
    given = {"x_ND": x, "weight_OD": weight, "targets_N": targets, **changes}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**given)
