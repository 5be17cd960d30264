"""Attention against transformers' implementations, its cache, and its messages."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextRotaryEmbedding,
)

from llmtrain.context import SequenceContext
from llmtrain.mixers.attention import Attention
from llmtrain.model.init import initialise
from llmtrain.model.position import Rope

D, B, T = 32, 2, 21
SIZES = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "sdpa",
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FULL = ["full_attention"]


def attention(**knobs):
    knobs = {"n_heads": 4, "init_std": 0.3, **knobs}
    mixer = Attention(D, layer_idx=0, n_layers=2, **knobs)
    initialise(mixer, 0)
    return mixer.double()


def context(batch, tokens, head_dim=8, prefix_tokens=0, fraction=1.0):
    ctx = SequenceContext.dense(batch, tokens, prefix_tokens=prefix_tokens)
    rope = Rope(D, max_seq_len=T, rotary_widths=(head_dim,), fraction=fraction)
    return ctx.with_rotary(rope.rotary(ctx))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(
    ("config", "theirs", "rotary", "mask", "knobs"),
    [
        (LlamaConfig(**SIZES), LlamaAttention, LlamaRotaryEmbedding, create_causal_mask, {}),
        (
            Qwen3Config(**SIZES),
            Qwen3Attention,
            Qwen3RotaryEmbedding,
            create_causal_mask,
            {"qk_norm": True},
        ),
        (
            MistralConfig(**SIZES, sliding_window=6),
            MistralAttention,
            MistralRotaryEmbedding,
            create_sliding_window_causal_mask,
            {"window": 6},
        ),
        (
            Qwen3NextConfig(
                **SIZES, rope_parameters={**ROPE, "partial_rotary_factor": 0.5}, layer_types=FULL
            ),
            Qwen3NextAttention,
            Qwen3NextRotaryEmbedding,
            create_causal_mask,
            {"qk_norm": True, "qk_norm_zero_centered": True, "output_gate": True},
        ),
        (
            Gemma2Config(
                **{**SIZES, "attn_implementation": "eager"},
                attn_logit_softcapping=0.8,
                query_pre_attn_scalar=5,
                sliding_window=6,
                layer_types=["sliding_attention"],
            ),
            Gemma2Attention,
            Gemma2RotaryEmbedding,
            create_sliding_window_causal_mask,
            {"softcap": 0.8, "softmax_scale": 5**-0.5, "window": 6},
        ),
    ],
    ids=["llama", "qwen3", "mistral", "qwen3_next", "gemma2"],
)
def test_equals_transformers(config, theirs, rotary, mask, knobs):
    mixer = attention(n_kv_heads=2, head_dim=12, **knobs)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module = theirs(config, layer_idx=0).double()
    weights = {k.replace("out_proj", "o_proj"): v for k, v in mixer.state_dict().items()}
    module.load_state_dict(weights, strict=True)
    x_BTD = noise(B, T, D)
    positions_BT = torch.arange(T).expand(B, T)
    mask_B1TT = mask(
        config=config,
        inputs_embeds=x_BTD,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BT,
    )
    tables = rotary(config)(x_BTD, positions_BT)
    expected_BTD, _ = module(
        x_BTD, position_embeddings=tables, attention_mask=mask_B1TT, is_causal=True
    )
    part = config.rope_parameters.get("partial_rotary_factor", 1.0)
    y_BTD, _ = mixer(x_BTD, context(B, T, head_dim=12, fraction=part))
    # their norm and angles are float32
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_window_needs_no_more_slots_than_its_size():
    """A ring buffer: 3 slots for 21 tokens, prefilled in chunks longer and shorter than it."""
    mixer, x_BTD = attention(window=3), noise(B, T, D)
    expected_BTD, _ = mixer(x_BTD, context(B, T))
    state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.float64)
    assert state["k"].shape == (B, 3, 4, 8)
    outputs, start = [], 0
    for end in (7, 8, 10, T):
        ctx = context(B, end - start, prefix_tokens=start)
        y_BTD, state = mixer(x_BTD[:, start:end], ctx, state)
        outputs.append(y_BTD)
        start = end
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected_BTD, rtol=1e-9, atol=1e-9)
    assert state["positions"].sort(dim=1).values.tolist() == [[T - 3, T - 2, T - 1]] * B


@torch.no_grad()
def test_sinks_stay_beside_the_window():
    """2 + 3 slots for 21 tokens; every output is that over the tokens which should be visible."""
    mixer, x_BTD = attention(window=3, sinks=2), noise(B, T, D)
    q_BTHK, k_BTHK, v_BTHV, _ = mixer.project(x_BTD, context(B, T))
    expected_BTD = torch.empty_like(x_BTD)
    for t in range(T):
        seen = sorted({0, 1, t - 2, t - 1, t} & set(range(t + 1)))
        scores_BHS = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], k_BTHK[:, seen]) * 8**-0.5
        o_BHV = torch.einsum("bhs,bshv->bhv", scores_BHS.softmax(-1), v_BTHV[:, seen])
        expected_BTD[:, t] = mixer.out_proj(o_BHV.flatten(1))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(mixer(x_BTD, context(B, T))[0], expected_BTD, **close)
    for cuts in ((1, 7, 8, 10, T), (9, T), (T,), range(1, T + 1)):
        state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.float64)
        assert state["k"].shape == (B, 5, 4, 8)
        outputs, start = [], 0
        for end in cuts:
            ctx = context(B, end - start, prefix_tokens=start)
            y_BTD, state = mixer(x_BTD[:, start:end], ctx, state)
            outputs.append(y_BTD)
            start = end
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected_BTD, **close)
        assert state["positions"].tolist() == [[0, 1, 20, 18, 19]] * B


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("slots", [1, 4, 7, 40])
@pytest.mark.parametrize("prefix", [0, 2, 20])
def test_no_slot_is_written_twice(sinks, slots, prefix):
    """Which write would win differs between devices. The newest tokens and the sinks are kept."""
    mixer = attention(window=3, sinks=sinks)
    tokens = 15
    sunk, last = mixer.kept(tokens, slots, prefix)
    kept = prefix + torch.tensor([*range(sunk), *range(last, tokens)])
    where = mixer.slot(kept, slots).tolist()
    assert len(set(where)) == len(where)
    assert all(0 <= slot < max(slots, sinks) for slot in where)
    newest = range(max(prefix, prefix + tokens - max(slots - sinks, 0)), prefix + tokens)
    wanted = {*range(prefix, min(sinks, prefix + tokens)), *newest}
    assert set(kept.tolist()) == wanted


def test_input_wider_than_the_model():
    """d_input: queries, keys and values read it, the output has the model's width."""
    mixer, x_BTI = attention(d_input=48, output_gate=True), noise(B, T, 48)
    assert (mixer.q_proj.in_features, mixer.q_proj.out_features) == (48, 2 * D)
    y_BTD, _ = mixer(x_BTI, context(B, T))
    assert y_BTD.shape == (B, T, D)
    state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.float64)
    _, state = mixer(x_BTI[:, :-1], context(B, T - 1), state)
    last_BD, _ = mixer.step(x_BTI[:, -1], context(B, 1, prefix_tokens=T - 1), state)
    torch.testing.assert_close(last_BD, y_BTD[:, -1], rtol=1e-9, atol=1e-9)


def test_gradient_flows_through_a_prefix():
    mixer, x_BTD = attention(n_kv_heads=1), noise(1, 8, D).requires_grad_()
    whole = torch.autograd.grad(mixer(x_BTD, context(1, 8))[0][:, 5:].sum(), x_BTD)[0]
    state = mixer.init_state(1, max_tokens=8, device="cpu", dtype=torch.float64)
    _, state = mixer(x_BTD[:, :5], context(1, 5), state)
    y_BTD, _ = mixer(x_BTD[:, 5:], context(1, 3, prefix_tokens=5), state)
    split = torch.autograd.grad(y_BTD.sum(), x_BTD)[0]
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)


def test_knobs_reach_the_mixer():
    """Each changes the output: none is silently ignored."""
    x_BTD, ctx = noise(B, T, D), context(B, T)
    plain_BTD, _ = attention()(x_BTD, ctx)
    outputs = [plain_BTD]
    for knobs in (
        {"window": 4},
        {"window": 4, "sinks": 2},
        {"softcap": 0.5},
        {"output_gate": True},
        {"softmax_scale": 0.1},
        {"init_std": 0.2},
        {"qk_norm": True},
        {"qk_norm": True, "qk_norm_eps": 0.1},
    ):
        y_BTD = attention(**knobs)(x_BTD, ctx)[0]
        assert not any(y_BTD.equal(other_BTD) for other_BTD in outputs), knobs
        outputs.append(y_BTD)
    centred = attention(qk_norm=True, qk_norm_zero_centered=True)
    assert (centred.q_norm.weight == 0).all()
    assert centred(x_BTD, ctx)[0].equal(attention(qk_norm=True)(x_BTD, ctx)[0])
    assert attention(bias=True).q_proj.bias.shape == (D,)
    assert attention(head_dim=16).out_proj.weight.shape == (D, 64)
    reference_BTD, _ = attention(backend="reference")(x_BTD, ctx)
    torch.testing.assert_close(reference_BTD, plain_BTD, rtol=1e-9, atol=1e-9)


def test_output_projection_starts_smaller_with_depth():
    shallow = Attention(64, layer_idx=0, n_layers=2, n_heads=4)
    deep = Attention(64, layer_idx=0, n_layers=32, n_heads=4)
    for mixer in (shallow, deep):
        initialise(mixer, 0)
    ratio = shallow.out_proj.weight.std() / deep.out_proj.weight.std()
    assert ratio.item() == pytest.approx(4.0, rel=1e-4)
    assert shallow.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "n_heads=6 and n_kv_heads=4, .* set mixer.n_heads"),
        ({"n_heads": 5}, "d_model=32 and n_heads=5, expected a multiple; set mixer.head_dim"),
        ({"window": 0}, "window=0, expected at least 1 .* set mixer.window"),
        ({"sinks": 2}, "sinks=2 and window=None, expected 0, .* set mixer.sinks or mixer.window"),
        ({"sinks": -1, "window": 4}, "sinks=-1 and window=4, expected 0, or a positive number"),
        ({"softcap": 0.0}, "softcap=0.0, expected a positive number or null .* set mixer.softcap"),
        (
            {"qk_norm_zero_centered": True},
            "qk_norm_zero_centered=true with qk_norm=false, .* set mixer.qk_norm=true",
        ),
        ({"backend": "fast"}, "backend='fast', expected auto or one of .* set mixer.backend"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=f"attention: got {message}"):
        attention(**knobs)


def test_prefill_longer_than_its_state():
    mixer = attention()
    state = mixer.init_state(1, max_tokens=4, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"5 tokens for a state of 4, expected .* init_state"):
        mixer(noise(1, 5, D), context(1, 5), state)


def test_window_state_shorter_than_its_window():
    """Made for 4 tokens, it may not become a ring of 4 when the window is 8."""
    mixer = attention(window=8)
    state = mixer.init_state(1, max_tokens=4, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"5 tokens for a state of 4, expected .* init_state"):
        mixer(noise(1, 5, D), context(1, 5), state)


def test_packed_rows_have_no_state():
    mixer = attention()
    state = mixer.init_state(1, max_tokens=6, device="cpu", dtype=torch.float64)
    ctx = SequenceContext.packed(torch.tensor([[True, False, True, False, False, False]]))
    with pytest.raises(ValueError, match="state together with packed documents, expected one"):
        mixer(noise(1, 6, D), ctx, state)


def test_named_backend_that_cannot_run_says_so():
    mixer = attention(backend="varlen")
    with pytest.raises(ValueError, match=r"backend=varlen: needs .* CUDA; got cpu float64"):
        mixer(noise(B, T, D), context(B, T))


@pytest.mark.slow
def test_inductor_packed():
    """The default compiler, forward and backward, needs a C++ compiler."""
    mixer, x_BTD = attention(n_kv_heads=2).float(), noise(B, T, D).float().requires_grad_()
    starts_BT = torch.zeros(B, T, dtype=torch.bool)
    starts_BT[0, 9] = True
    ctx = SequenceContext.packed(starts_BT)
    ctx = ctx.with_rotary(Rope(D, max_seq_len=T, rotary_widths=(8,)).rotary(ctx))
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True)
    results = []
    for call in (compiled, mixer):
        y_BTD = call(x_BTD, ctx)[0]
        results.append((y_BTD, *torch.autograd.grad(y_BTD.square().sum(), [x_BTD])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
