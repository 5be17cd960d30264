"""Latent attention against transformers' DeepseekV3, its cache, its two forms and its messages."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

from llmtrain.context import SequenceContext
from llmtrain.mixers.mla import LatentAttention
from llmtrain.model.init import initialise
from llmtrain.model.position import Rope

D, B, T = 32, 2, 21
WIDTHS = {
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def mla(**knobs):
    knobs = {"n_heads": 4, "init_std": 0.3, **knobs}
    mixer = LatentAttention(D, layer_idx=0, n_layers=2, **knobs)
    initialise(mixer, 0)
    return mixer.double()


def context(batch, tokens, width, prefix_tokens=0, **rope):
    ctx = SequenceContext.dense(batch, tokens, prefix_tokens=prefix_tokens)
    return ctx.with_rotary(Rope(D, max_seq_len=T, rotary_widths=(width,), **rope).rotary(ctx))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def their_weights(mixer):
    names = {
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_up": "q_proj" if mixer.q_lora_rank is None else "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "out_proj": "o_proj",
    }
    named = (name.split(".") for name in mixer.state_dict())
    return {f"{names[n]}.{kind}": mixer.state_dict()[f"{n}.{kind}"] for n, kind in named}


@pytest.fixture
def float64_norm(monkeypatch):
    """transformers' RMSNorm rounds to float32 inside; in float64 it would set the tolerance."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(theirs.DeepseekV3RMSNorm, "forward", forward)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [14, None])
@pytest.mark.parametrize("mscale", [None, 1.0, 0.707])
def test_equals_transformers(float64_norm, interleaved, rank, mscale):
    """mscale: with YaRN as DeepSeek writes it down, mscale = mscale_all_dim."""
    widths = {**WIDTHS, "q_lora_rank": rank}
    rope, knobs, angles = {"rope_type": "default", "rope_theta": 500.0}, {}, {"theta": 500.0}
    if mscale is not None:
        rope = {
            **rope,
            **YARN,
            "rope_type": "yarn",
            "original_max_position_embeddings": 8,
            "mscale": mscale,
            "mscale_all_dim": mscale,
        }
        knobs = {"yarn_factor": 4.0, "yarn_mscale": mscale}
        angles |= {"scaling": "yarn", **YARN, "original_max_seq_len": 8, "attention_factor": 1.0}
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        **widths,
        rope_parameters=rope,
        rope_interleave=interleaved,
        attn_implementation="sdpa",
    )
    mixer = mla(**widths, norm_eps=1e-6, **knobs)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    module = theirs.DeepseekV3Attention(config, layer_idx=0).double()
    module.load_state_dict(their_weights(mixer), strict=True)
    x_BTD = noise(B, T, D).requires_grad_()
    tables = theirs.DeepseekV3RotaryEmbedding(config)(x_BTD.float(), torch.arange(T).expand(B, T))
    mask = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected_BTD, _ = module(x_BTD, tables, mask)
    y_BTD, _ = mixer(x_BTD, context(B, T, 6, **angles, interleaved=interleaved))
    close = {"rtol": 1e-5, "atol": 1e-5}  # their angles are products of float32
    torch.testing.assert_close(y_BTD, expected_BTD, **close)
    ours = torch.autograd.grad(y_BTD.square().mean(), [x_BTD, *mixer.parameters()])
    expected_BTD.square().mean().backward()
    torch.testing.assert_close(ours[0], x_BTD.grad, **close)
    gradients = {n: p.grad for n, p in module.named_parameters()}
    mapped = dict(zip(their_weights(mixer), ours[1:], strict=True))
    assert sorted(mapped) == sorted(gradients)
    for name, gradient in mapped.items():
        torch.testing.assert_close(gradient, gradients[name], **close)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_absorbed_equals_expanded(backend):
    """Steps, which never make keys and values of the past, against the whole row."""
    mixer, x_BTD = mla(**WIDTHS, backend=backend), noise(B, T, D)
    expected_BTD, _ = mixer(x_BTD, context(B, T, 6))
    state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.float64)
    for t in range(T):
        y_BD, state = mixer.step(x_BTD[:, t], context(B, 1, 6, prefix_tokens=t), state)
        torch.testing.assert_close(y_BD, expected_BTD[:, t], **EXACT)


@torch.no_grad()
def test_absorbed_in_bfloat16_is_near_float64():
    """It rounds the absorbed query and the mixed latent, where the expanded form rounds keys and
    values: about the same error."""
    exact, x_BTD = mla(**WIDTHS), noise(B, T, D)
    expected_BTD, _ = exact(x_BTD, context(B, T, 6))
    low = mla(**WIDTHS).float()
    expanded_BTD, _ = low(x_BTD.bfloat16(), context(B, T, 6))
    state = low.init_state(B, max_tokens=T, device="cpu", dtype=torch.bfloat16)
    steps = []
    for t in range(T):
        y_BD, state = low.step(x_BTD[:, t].bfloat16(), context(B, 1, 6, prefix_tokens=t), state)
        steps.append(y_BD)
    errors = [
        ((y_BTD.double() - expected_BTD).norm() / expected_BTD.norm()).item()
        for y_BTD in (expanded_BTD, torch.stack(steps, dim=1))
    ]
    assert errors[0] < 0.02
    assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_steps_do_not_expand(monkeypatch):
    mixer, x_BTD = mla(**WIDTHS), noise(B, T, D)
    state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.float64)
    monkeypatch.setattr(mixer, "expand", None)
    mixer.step(x_BTD[:, 0], context(B, 1, 6), state)


def test_cache_is_the_latent():
    """R + rope numbers a token, whatever the heads: here 16 instead of 4 (18 + 9)."""
    mixer = mla(**WIDTHS)
    state = mixer.init_state(B, max_tokens=T, device="cpu", dtype=torch.bfloat16)
    assert {name: x.shape for name, x in state.items()} == {"latent": (B, T, 10 + 6)}
    assert mixer.state_bytes(1000) == 1000 * 16 * 2


def test_proportions_of_deepseek_v2():
    """arXiv:2405.04434, section 3.1.2: heads of 128, latent 512, rotated part 64."""
    with torch.device("meta"):
        mixer = LatentAttention(5120, layer_idx=0, n_layers=60, n_heads=128, head_dim=128)
    assert (mixer.kv_lora_rank, mixer.rope, mixer.nope, mixer.v_head_dim) == (512, 64, 128, 128)
    assert mixer.scale == 192**-0.5


def test_gradient_flows_through_a_prefix():
    mixer, x_BTD = mla(**WIDTHS), noise(1, 8, D).requires_grad_()
    whole = torch.autograd.grad(mixer(x_BTD, context(1, 8, 6))[0][:, 5:].sum(), x_BTD)[0]
    state = mixer.init_state(1, max_tokens=8, device="cpu", dtype=torch.float64)
    _, state = mixer(x_BTD[:, :5], context(1, 5, 6), state)
    y_BTD, _ = mixer(x_BTD[:, 5:], context(1, 3, 6, prefix_tokens=5), state)
    torch.testing.assert_close(torch.autograd.grad(y_BTD.sum(), x_BTD)[0], whole, **EXACT)


def test_knobs_reach_the_mixer():
    x_BTD, ctx = noise(B, T, D), context(B, T, 4)
    outputs = []
    for knobs in (
        {},
        {"q_lora_rank": 5},
        {"kv_lora_rank": 5},
        {"qk_nope_head_dim": 5},
        {"v_head_dim": 5},
        {"norm_eps": 0.5},
        {"init_std": 0.2},
        {"softmax_scale": 0.1},
        {"yarn_factor": 4.0},
        {"yarn_factor": 4.0, "yarn_mscale": 0.7},
    ):
        y_BTD = mla(**knobs)(x_BTD, ctx)[0]
        assert not any(y_BTD.equal(other_BTD) for other_BTD in outputs), knobs
        outputs.append(y_BTD)
    assert mla(qk_rope_head_dim=8).rotary_width == 8
    assert mla(head_dim=10).rotary_width == 4
    assert mla(head_dim=12).out_proj.in_features == 48
    reference_BTD, _ = mla(backend="reference")(x_BTD, ctx)
    torch.testing.assert_close(reference_BTD, outputs[0], **EXACT)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_heads": 0}, "n_heads=0, expected at least 1; set mixer.n_heads"),
        ({"n_heads": 5}, "d_model=32 and n_heads=5, expected a multiple; set mixer.head_dim"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0, expected at least 1; set mixer.kv_lora_rank"),
        ({"head_dim": 0}, "kv_lora_rank=0, expected at least 1; .* or mixer.head_dim"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3, expected an even number .* set mixer"),
        ({"backend": "fast"}, "backend='fast', expected auto or one of .* set mixer.backend"),
        ({"yarn_factor": 0.5}, "yarn_factor=0.5 .* at least 1 .* set mixer.yarn_factor"),
        ({"yarn_factor": 2.0, "softmax_scale": 1.0}, "yarn_factor=2.0 and softmax_scale=1.0, "),
        ({"yarn_mscale": 0.7}, "yarn_mscale=0.7 without yarn_factor, where it has no effect"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=f"mla: got {message}"):
        mla(**knobs)


def test_prefill_that_does_not_fit_its_state():
    mixer = mla(**WIDTHS)
    state = mixer.init_state(1, max_tokens=4, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mla: got 5 tokens for a state of 4, .* init_state"):
        mixer(noise(1, 5, D), context(1, 5, 6), state)
    ctx = SequenceContext.packed(torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="state together with packed documents, expected one"):
        mixer(noise(1, 3, D), ctx, state)


@pytest.mark.parametrize("documents", [False, True])
def test_kernel_backend(documents):
    choice = {"device": torch.device("cpu"), "dtype": torch.float32, "tokens": 64}
    assert mla(**WIDTHS).kernel_backend(**choice, documents=documents) == "sdpa"
    with pytest.raises(ValueError, match="backend=varlen: needs bfloat16 or float16 on CUDA"):
        mla(**WIDTHS, backend="varlen").kernel_backend(**choice, documents=documents)
