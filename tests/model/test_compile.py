"""torch.compile takes the model and the objective as one graph, and every block by itself."""

from dataclasses import replace

import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.objectives.causal import Causal

SMALL = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=48",
    "model.init_std=0.2",
)
CASES = {
    "gqa": ((), {}, Causal(), "dense", "none"),
    "window_qk_norm": (
        ("mixer.window=5", "mixer.qk_norm=true"),
        {},
        Causal(z_loss=1e-4),
        "packed",
        "none",
    ),
    "hybrid_shared_recomputed": (
        ("mixers.b.window=4", "stack.pattern=abab", "stack.shared=b", "model.n_layers=4"),
        {"mixers": {"b": "sliding_window"}},
        Causal(),
        "packed",
        "full",
    ),
    "recurrent_depth": (
        ("stack.repeats=3", "stack.backprop_repeats=2", "stack.sampling=fixed", "model.n_layers=3"),
        {"stack": "recurrent_depth"},
        Causal(),
        "packed",
        "full",
    ),
    "relu2_learned_untied_chunked": (
        ("channel.activation_l1=0.1", "model.tie_embeddings=false"),
        {"channel": "relu2", "position": "learned", "norm": "layernorm"},
        Causal(chunk_tokens=30),
        "packed",
        "none",
    ),
}


def batch(packed):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (2, 24), generator=generator)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, 10] = starts[1, 3] = True
    ctx = SequenceContext.packed(starts) if packed else SequenceContext.dense(2, 24)
    return tokens, tokens.roll(-1, 1), torch.ones(2, 24), ctx


def loss_and_gradients(function, model, *arguments):
    model.zero_grad()
    out = function(model, *arguments)
    out.loss_sum.backward()
    return [out.loss_sum, out.ce_sum, *out.aux.values(), *(p.grad for p in model.parameters())]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_one_graph(build_model, case):
    changes, options, objective, rows, checkpointing = CASES[case]
    model = build_model(*SMALL, *changes, dtype=torch.float32, **options)
    model.stack.activation_checkpointing = checkpointing
    arguments = batch(rows == "packed")
    expected = loss_and_gradients(objective, model, *arguments)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False)
    for got, want in zip(loss_and_gradients(compiled, model, *arguments), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_new_batches_do_not_compile_again(build_model):
    model, objective = build_model(*SMALL, dtype=torch.float32), Causal()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(objective, backend=counter, fullgraph=True, dynamic=False)
    tokens, targets, weights, _ = batch(True)
    for seed in range(4):
        starts = torch.rand(2, 24, generator=torch.Generator().manual_seed(seed)) < 0.2
        # the longest document is a number of the host: the trainer gives one bound for all batches
        ctx = replace(SequenceContext.packed(starts), max_seqlen=24)
        compiled(model, tokens, targets, weights, ctx)
    assert counter.frame_count == 1


def test_blocks_share_one_graph(build_model):
    model, objective = build_model(*SMALL, dtype=torch.float32), Causal()
    arguments = batch(True)
    expected = loss_and_gradients(objective, model, *arguments)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.stack.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    for got, want in zip(loss_and_gradients(objective, model, *arguments), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_inductor(build_model):
    """The compiler that training uses, on the usual model in its training dtype."""
    model = build_model(*SMALL, dtype=torch.bfloat16)
    arguments = batch(True)
    objective = Causal()
    exact = build_model(*SMALL, dtype=torch.float64)
    reference = loss_and_gradients(objective, exact, *arguments)
    eager = loss_and_gradients(objective, model, *arguments)
    compiled = torch.compile(objective, fullgraph=True, dynamic=False)
    got = loss_and_gradients(compiled, model, *arguments)
    for ours, theirs, true in zip(got, eager, reference, strict=True):
        scale = true.double().square().mean().sqrt()
        error = ((ours.double() - true).square().mean().sqrt() / scale).item()
        eager_error = ((theirs.double() - true).square().mean().sqrt() / scale).item()
        assert error <= 1.5 * eager_error + 2e-3
