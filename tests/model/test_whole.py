"""The shipped parts put together by llmtrain.build."""

import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.model.language_model import ModelState
from llmtrain.objectives.causal import Causal

SMALL = (
    "model.d_model=24",
    "model.n_layers=4",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.head_dim=6",
    "model.ffn_hidden=40",
    "model.init_std=0.2",
    "model.max_seq_len=32",
)
RECURRENT = {"stack": "recurrent_depth"}
# The Universal Transformer's loop: the core's parameters are shared, and that is all.
LOOPED = (
    "stack.injection=none",
    "stack.latent=prelude",
    "stack.sampling=fixed",
    "stack.backprop_repeats=null",
    "stack.core_norm=false",
    "stack.norm_position=pre",
)
MODELS = {
    "gqa": ((), {}),
    "mha_layernorm_gelu_learned": (
        ("channel.bias=true", "mixer.bias=true"),
        {"mixer": "mha", "norm": "layernorm", "channel": "gelu", "position": "learned"},
    ),
    "mqa_relu2_sinusoidal": (
        ("channel.activation_l1=0.1",),
        {"mixer": "mqa", "channel": "relu2", "position": "sinusoidal"},
    ),
    "window_qk_norm": (("mixer.window=5", "mixer.qk_norm=true"), {"mixer": "sliding_window"}),
    "hybrid": (
        ("mixers.b.window=4", "stack.pattern=ba"),
        {"mixers": {"b": "sliding_window"}},
    ),
    "looped_untied": ((*LOOPED, "stack.repeats=2", "model.tie_embeddings=false"), RECURRENT),
    "recurrent_depth": (
        ("stack.repeats=3", "stack.backprop_repeats=2", "stack.pattern=abba", "mixers.b.window=4"),
        {**RECURRENT, "mixers": {"b": "sliding_window"}},
    ),
    "recurrent_depth_add_zeros": (
        ("stack.repeats=2", "stack.injection=add", "stack.latent=zeros", "stack.coda=0"),
        RECURRENT,
    ),
    "shared_layers": (
        ("stack.pattern=abab", "stack.shared=b", "mixers.b.window=4"),
        {"mixers": {"b": "sliding_window"}},
    ),
    "shared_attention_beside_mixers_alone": (
        ("stack.pattern=baba", "stack.channel_pattern=baba"),
        {
            "stack": "shared_attention",
            "mixer": "mqa",
            "channel": "none",
            "mixers": {"b": "attention"},
            "channels": {"b": "swiglu"},
        },
    ),
    "channels_by_letter": (("stack.channel_pattern=aabb",), {"channels": {"b": "relu2"}}),
    "mixers_alone": ((), {"channel": "none"}),
    "latent_and_wider_heads": (
        (
            "mixer.q_lora_rank=8",
            "mixers.b.head_dim=10",
            "mixers.b.output_gate=true",
            "mixers.b.softcap=3.0",
            "stack.pattern=ab",
        ),
        {"mixer": "mla", "mixers": {"b": "attention"}},
    ),
    "sinks": (("mixer.window=4", "mixer.sinks=2"), {"mixer": "sliding_window"}),
    "post_norm": (("stack.norm_position=post",), {}),
    "sandwich_norm": (("stack.norm_position=sandwich",), {}),
    "peri_norm": (("stack.norm_position=peri",), {}),
    "yarn": (
        ("position.scaling=yarn", "position.factor=2.0", "position.original_max_seq_len=16"),
        {},
    ),
    "no_position_scaled_embedding": (("embedding.scale=4.9",), {"position": "none"}),
}


@pytest.fixture(params=MODELS)
def model(request, build_model):
    changes, options = MODELS[request.param]
    return build_model(*SMALL, *changes, **options)


def random_tokens(rows, length):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(3))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-10)


def test_decode_equals_forward_for_prompts_of_different_lengths(model):
    tokens = random_tokens(3, 14)
    whole = model.logits(model(tokens, SequenceContext.dense(3, 14)).hidden_BTD)
    lengths, states = (1, 9, 4), []
    for row, length in enumerate(lengths):
        ctx = SequenceContext.dense(1, length)
        out = model(tokens[row : row + 1, :length], ctx, model.init_state(1, 14))
        close(model.logits(out.hidden_BTD)[0], whole[row, :length])
        states.append(out.state)
    state = ModelState.cat(states)
    for t in range(5):
        step_tokens = torch.stack([tokens[row, n + t] for row, n in enumerate(lengths)])
        logits, state = model.step(step_tokens, state)
        for row, n in enumerate(lengths):
            close(logits[row], whole[row, n + t])


def test_packed_equals_separate_with_gradients(model):
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16).flip(1)
    starts = torch.zeros(2, 16, dtype=torch.bool)
    starts[0, [5, 6]] = starts[1, 11] = True
    packed = SequenceContext.packed(starts)
    weights = torch.ones(2, 16, dtype=torch.float64)
    objective = Causal()

    hidden = model(tokens, packed).hidden_BTD
    out = objective(model, tokens, targets, weights, packed)
    out.loss_sum.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    losses = []
    for row, first, last in ((0, 0, 5), (0, 5, 6), (0, 6, 16), (1, 0, 11), (1, 11, 16)):
        piece = (slice(row, row + 1), slice(first, last))
        ctx = SequenceContext.dense(1, last - first)
        close(hidden[piece], model(tokens[piece], ctx).hidden_BTD)
        part = objective(model, tokens[piece], targets[piece], weights[piece], ctx)
        part.loss_sum.backward()
        losses.append(part.loss_sum)
    close(torch.stack(losses).sum(), out.loss_sum)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        close(parameter.grad, gradient)


def test_gradients_of_packed_rows_stay_in_their_document(model):
    tokens = random_tokens(1, 12)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, 7] = True
    leaf = {}

    def keep(module, arguments, output):
        leaf["x"] = output.detach().requires_grad_()
        return leaf["x"]

    with torch.no_grad():
        model.embedding.weight.mul_(2)
    handle = model.embedding.register_forward_hook(keep)
    hidden = model(tokens, SequenceContext.packed(starts)).hidden_BTD
    handle.remove()
    hidden[0, 7:].square().sum().backward()
    assert (leaf["x"].grad[0, :7] == 0).all()
    assert (leaf["x"].grad[0, 7:].abs().sum(-1) > 0).all()


def test_causal_bitwise(model):
    tokens = random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 50
    ctx = SequenceContext.dense(2, 12)
    a, b = model(tokens, ctx).hidden_BTD, model(changed, ctx).hidden_BTD
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.equal(a[:, 8], b[:, 8])


def test_every_parameter_gets_a_finite_gradient(model):
    tokens = random_tokens(2, 12)
    ctx = SequenceContext.dense(2, 12)
    weights = torch.ones(2, 12, dtype=torch.float64)
    Causal(z_loss=1e-4)(model, tokens, tokens.roll(-1, 1), weights, ctx).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_builds_and_runs_on_meta(build_model):
    model = build_model(*SMALL, device="meta", dtype=torch.bfloat16)
    ctx = SequenceContext.dense(2, 12, device="meta")
    hidden = model(torch.zeros(2, 12, dtype=torch.int64, device="meta"), ctx).hidden_BTD
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).shape == (2, 12, 50)


def test_vocabulary_is_padded_to_the_multiple(build_model):
    model = build_model(*SMALL, vocab_size=70)
    assert model.embedding.weight.shape == (128, 24)
    hidden = model(random_tokens(1, 4), SequenceContext.dense(1, 4)).hidden_BTD
    probabilities = model.logits(hidden).softmax(-1)
    assert probabilities.shape == (1, 4, 70)


def test_pattern(build_model):
    def windows(*changes, **options):
        model = build_model(*SMALL, *changes, **options)
        return [block.mixer.window for block in model.stack.blocks]

    mixers = {"mixers": {"b": "sliding_window"}}
    small = "mixers.b.window=4"
    assert windows() == [None] * 4
    assert windows(small, "stack.pattern=ab", **mixers) == [None, 4, None, 4]
    assert windows(small, "stack.pattern=aaab", **mixers) == [None, None, None, 4]
    assert windows(small, "stack.pattern=[b,a,a,b]", **mixers) == [4, None, None, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stack.pattern=aab"], r"stack.pattern: got 'aab' \(3 letters\) .*n_layers=4, expected a"),
        (["stack.pattern=[a,b]"], r"stack.pattern: got a list of 2 letters, expected .*n_layers=4"),
        (["stack.pattern=abz_"], r"stack.pattern: letter 'z' names no mixer, expected one of a, b"),
        (["model.d_model=25", "model.head_dim=null"], r"d_model=25.*n_heads=4.*multiple; set"),
        (["model.n_kv_heads=3"], r"mixer=attention: .*n_heads=4 and n_kv_heads=3, expected"),
        (["stack.norm_position=both"], r"norm_position: got 'both', expected one of pre, post"),
    ],
)
def test_sizes_that_do_not_fit(build_model, changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(*SMALL, *changes, mixers={"b": "sliding_window"})
