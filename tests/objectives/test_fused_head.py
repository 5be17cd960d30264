"""Objectives whose head keeps no logits give what those with logits do."""

import pytest
import torch

from llmtrain.accounting import FP32_BYTES, fused_head_bytes
from llmtrain.context import SequenceContext
from llmtrain.data.batch import MicroBatch
from llmtrain.objectives.causal import HEADS, Causal, head_backend
from llmtrain.objectives.multi_token import MultiToken
from llmtrain.train.module import TrainModule

ROWS, TOKENS = 2, 12
SMALL = ("model.d_model=24", "model.n_layers=2", "model.n_heads=4", "model.ffn_hidden=40")
MODELS = {
    "tied": (),
    "untied": ("model.tie_embeddings=false",),
    "capped": ("embedding.logit_softcap=2.0",),
    "narrow": ("model.mup_base_width=12",),
}


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    window_BT = torch.randint(50, (ROWS, TOKENS + 1), generator=generator)
    weights_BT = torch.rand(ROWS, TOKENS, generator=generator, dtype=dtype)
    weights_BT[1, 8:] = 0
    return window_BT[:, :-1], window_BT[:, 1:], weights_BT, SequenceContext.dense(ROWS, TOKENS)


def results(objective, model, dtype=torch.float64, gradient=1.0):
    model.zero_grad()
    out = objective(model, *batch(dtype))
    (gradient * out.loss_sum).backward()
    return [out.loss_sum, out.ce_sum, *out.aux.values(), *(p.grad for p in model.parameters())]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_numbers(build_model, kind, z_loss, chunk_tokens):
    model, knobs = build_model(*SMALL, *MODELS[kind]), {"z_loss": z_loss}
    expected = results(Causal(**knobs), model)
    for backend in ("chunked", "reference"):
        objective = Causal(**knobs, backend=backend, chunk_tokens=chunk_tokens)
        close(results(objective, model), expected)


def test_the_same_numbers_of_every_module(build_model):
    model = build_model(*SMALL, "objective.depth=2", objective="multi_token")
    knobs = {"depth": 2, "loss_weight": 0.7, "z_loss": 0.1}
    expected = results(MultiToken(**knobs), model)
    close(results(MultiToken(**knobs, backend="chunked"), model), expected)


@pytest.mark.parametrize("expected_gradient", [1.0, 0.125, 3.0])
def test_an_expected_gradient_changes_no_number(build_model, expected_gradient):
    model = build_model(*SMALL, "objective.depth=2", objective="multi_token")
    knobs = {"depth": 2, "loss_weight": 0.7}
    expected = results(MultiToken(**knobs), model, gradient=0.125)
    objective = MultiToken(**knobs, backend="chunked")
    objective.expected_gradient = expected_gradient
    close(results(objective, model, gradient=0.125), expected)


def test_each_head_is_told_what_gradient_to_expect(build_model, monkeypatch):
    model = build_model(*SMALL, "objective.depth=2", objective="multi_token")
    objective, told = MultiToken(depth=2, loss_weight=0.5, backend="chunked"), []
    module = TrainModule(model, objective, torch.ones(50))
    module.expect_gradient(0.25)
    forward = objective.fused_loss.forward
    monkeypatch.setattr(
        objective.fused_loss, "forward", lambda *a: told.append(a[4]) or forward(*a)
    )
    tokens, targets, weights, ctx = batch()
    module(MicroBatch(tokens_BT=tokens, targets_BT=targets, weights_BT=weights, ctx=ctx))
    assert told == [0.25, 0.0625, 0.0625]


def test_no_logits_are_kept(build_model):
    model, kept = build_model(*SMALL), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    logits = {(ROWS * TOKENS, columns) for columns in (model.vocab_size, model.padded_vocab_size)}
    for backend in ("logits", "chunked"):
        kept.clear()
        objective = Causal(backend=backend, chunk_tokens=5 if backend == "chunked" else None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective(model, *batch())
        assert bool(logits & set(kept)) == (backend == "logits")


@pytest.mark.parametrize("objective", [Causal, MultiToken])
def test_one_graph(build_model, objective):
    torch._dynamo.reset()
    name = "multi_token" if objective is MultiToken else "causal"
    model = build_model(*SMALL, objective=name, dtype=torch.float32)
    fused = objective(z_loss=0.1, backend="chunked", chunk_tokens=7)
    fused.expected_gradient = 0.5
    expected = results(fused, model, torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=False)
    got = results(compiled, model, torch.float32)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_auto_is_fused_on_cuda_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("llmtrain_kernels.triton_backend.HAS_TRITON", True)
    assert head_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert head_backend("auto", "cuda", torch.float64) == "logits"
    assert head_backend("auto", "cpu", torch.float32) == "logits"
    assert all(head_backend(name, "cpu", torch.float32) == name for name in HEADS[1:])
    monkeypatch.setattr("llmtrain_kernels.triton_backend.HAS_TRITON", False)
    assert head_backend("auto", "cuda", torch.bfloat16) == "logits"


def test_what_runs_is_known_before_the_start(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert Causal().kernel_backend(**cpu) is None
    assert Causal(backend="chunked").kernel_backend(**cpu) == "chunked"
    with pytest.raises(ValueError, match=r"linear_cross_entropy: got backend='triton'"):
        Causal(backend="triton").kernel_backend(**cpu)
    with pytest.raises(ValueError, match=r"backend: got 'fast', expected one of auto, logits, tri"):
        Causal(backend="fast")


def test_memory_of_the_plan(build_model):
    """Buffer, weight in compute dtype, and gradients of every head."""
    options = {"objective": "multi_token", "device": "meta", "dtype": torch.bfloat16}
    model, plain = build_model(*SMALL, **options), build_model(*SMALL, device="meta")
    gradients = 64 * 24 * FP32_BYTES + 1000 * 24 * 2
    assert fused_head_bytes(model, 1000, chunk_tokens=100) == (
        100 * 64 * 2 + 64 * 24 * 2 + 2 * gradients
    )
    longer = fused_head_bytes(model, 10**7, chunk_tokens=None)
    assert longer == 2**28 + 64 * 24 * 2 + 2 * (64 * 24 * FP32_BYTES + 10**7 * 24 * 2)
    assert plain.compute_dtype.itemsize >= 4
    assert fused_head_bytes(plain, 10, chunk_tokens=None) == (
        10 * 64 * plain.compute_dtype.itemsize
        + 64 * 24 * FP32_BYTES
        + 10 * 24 * plain.compute_dtype.itemsize
    )
