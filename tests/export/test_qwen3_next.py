"""transformers' Qwen3-Next as an independent implementation, of Gated DeltaNet and of the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
)

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.export.qwen3_next import (
    deltanet_weights,
    qwen3_next_config,
    qwen3_next_weights,
    to_qwen3_next,
)
from llmtrain.mixers.gated_deltanet import GatedDeltaNet
from llmtrain.model.init import initialise

SMALL = (
    "model.d_model=48",
    "model.n_layers=4",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.head_dim=16",
    "model.ffn_hidden=24",
    "model.init_std=0.2",
    "model.norm_eps=1e-6",
    "model.max_seq_len=64",
    "model.tie_embeddings=false",
    "position.fraction=0.25",
    "norm.zero_centered=true",
    "mixer.n_heads=2",
    "mixer.n_v_heads=4",
    "mixer.expand_k=0.5",
    "mixer.expand_v=0.5",
    "mixer.chunk=4",
    "mixers.b.output_gate=true",
    "mixers.b.qk_norm=true",
    "mixers.b.qk_norm_zero_centered=true",
)
EXPERTS = (
    "channel.n_experts=6",
    "channel.top_k=3",
    "channel.n_shared=1",
    "channel.shared_hidden=20",
    "channel.shared_gate=true",
    "channel.balance_loss=0",
    "channel.z_loss=0",
)
HYBRID = {"mixer": "gated_deltanet", "mixers": {"b": "attention"}, "stack": "hybrid"}
# name -> changes, options
MODELS = {
    "dense": ((), {}),
    "experts": (EXPERTS, {"channel": "moe"}),
    "experts_as_scored": ((*EXPERTS, "channel.renormalise=false"), {"channel": "moe"}),
    "dense_and_experts": (
        (*EXPERTS, "stack.channel_pattern=ba", "channels.b.hidden=40"),
        {"channel": "moe", "channels": {"b": "swiglu"}},
    ),
    "tied": (("stack.pattern=ab", "model.tie_embeddings=true"), {}),
}


@pytest.fixture(params=MODELS)
def model(request, build_model, shuffle_norms):
    changes, options = MODELS[request.param]
    return shuffle_norms(build_model(*SMALL, *changes, **HYBRID, **options))


def exported(model):
    """Their grouped matrix product has no float64."""
    theirs = to_qwen3_next(model)
    theirs.set_experts_implementation("eager")
    return theirs


@pytest.fixture
def float64_norms(monkeypatch):
    """Their norms without rounding to float32 inside."""

    def plain(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    def gated(self, x, gate):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * F.silu(gate)

    monkeypatch.setattr(Qwen3NextRMSNorm, "forward", plain)
    monkeypatch.setattr(Qwen3NextRMSNormGated, "forward", gated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layer_alone(shuffle_norms, dtype):
    """Values and all gradients over two chunks and a rest. Their recurrence and norm are float32
    in both dtypes."""
    ours = GatedDeltaNet(
        24,
        layer_idx=0,
        n_layers=2,
        n_heads=2,
        n_v_heads=6,
        head_dim=8,
        expand_k=None,
        expand_v=0.625,
        norm_eps=1e-6,
        init_std=0.3,
    )
    initialise(ours, 0)
    ours = shuffle_norms(ours).to(dtype)
    config = Qwen3NextConfig(
        hidden_size=24,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=5,
        rms_norm_eps=1e-6,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0).to(dtype)
    theirs.load_state_dict({k: v.detach() for k, v in deltanet_weights(ours).items()})
    generator = torch.Generator().manual_seed(3)
    x_BTD, weights_BTD = torch.randn(2, 2, 130, 24, generator=generator, dtype=torch.float64).to(
        dtype
    )
    inputs = [x_BTD.clone().requires_grad_() for _ in range(2)]
    y_BTD = ours(inputs[0], SequenceContext.dense(2, 130))[0]
    expected_BTD = theirs(inputs[1])
    torch.testing.assert_close(y_BTD, expected_BTD, atol=1e-5, rtol=1e-5)
    (y_BTD * weights_BTD).sum().backward()
    (expected_BTD * weights_BTD).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=5e-5, rtol=1e-5)
    gradients = copy.deepcopy(ours)
    for parameter, mine in zip(gradients.parameters(), ours.parameters(), strict=True):
        parameter.data = mine.grad
    found, expected = deltanet_weights(gradients), dict(theirs.named_parameters())
    assert sorted(found) == sorted(expected)
    for name, parameter in expected.items():
        size = parameter.grad.abs().max()
        assert size > 1e-3, name
        torch.testing.assert_close(found[name] / size, parameter.grad / size, atol=2e-5, rtol=0)


def test_logits_loss_and_gradients(model, float64_norms, same_function):
    """In float64, but their routers and recurrences are float32 inside."""
    same_function(model, exported(model), qwen3_next_weights, atol=3e-5, rtol=1e-5)


def test_greedy_generation_token_for_token(model, same_greedy_text):
    same_greedy_text(model, exported(model))


def test_float32_and_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {**HYBRID, "channel": "moe", "dtype": torch.float32}
    model = shuffle_norms(build_model(*SMALL, *EXPERTS, **options))
    to_qwen3_next(model).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_published_80b():
    """The preset's parts are those of the published configuration; 3.9B parameters, 3B without
    embedding and head, work on a token."""
    config = compose("train", ["experiment=qwen3_next_80b_a3b"])
    model = build.build_model(config, vocab_size=151936, device="meta")
    published = Qwen3NextConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
        norm_topk_prob=True,
        full_attention_interval=4,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
        },
        bos_token_id=0,
        eos_token_id=0,
    )
    assert qwen3_next_config(model).to_dict() == published.to_dict()
    with torch.device("meta"):
        theirs = Qwen3NextForCausalLM(published)
    ours = sum(p.numel() for p in model.parameters())
    assert ours == theirs.num_parameters() == 79_674_391_296
    idle = sum(block.channel.idle_parameters() for block in model.stack.blocks)
    assert round((ours - idle) / 1e9, 1) == 3.9


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["mixer.allow_neg_eigval=true"], {}, r"layer 0, mixer: got allow_neg_eigval=true, "),
        (["mixer.decay=false"], {}, r"layer 0, mixer: got decay=false, .*expected decay=true"),
        (["mixer.output_gate=false"], {}, r"layer 0, mixer: got output_gate=false, "),
        (["mixer.conv_bias=true"], {}, r"layer 0, mixer: got conv_bias=true, "),
        (["mixer.norm_eps=1e-5"], {}, r"layer 0, mixer: got norm_eps=1e-05, .*as everywhere"),
        (["mixers.b.output_gate=false"], {}, r"layer 3, mixer: got output_gate=false, "),
        (["mixers.b.qk_norm_eps=1e-5"], {}, r"layer 3, mixer: got qk_norm_eps=1e-05, "),
        (["norm.zero_centered=false"], {}, r"layer 0, norm1: got zero_centered=false, "),
        (["position.scaling=linear", "position.factor=2.0"], {}, r"position: got scaled"),
        (["stack.pattern=bbbb"], {}, r"stack: got no GatedDeltaNet layer, "),
        (["stack.pattern=aaaa"], {}, r"stack: got no Attention layer, "),
        (
            ["mixers.c.expand_v=1.0", "stack.pattern=acab"],
            {"mixers": {"b": "attention", "c": "gated_deltanet"}},
            r"stack: got GatedDeltaNet layers of different shapes, ",
        ),
        (["channel.bias=true"], {"channel": "swiglu"}, r"layer 0, channel: got bias=true, "),
        ([], {"channel": "gelu"}, r"layer 0, channel: got Gelu, .*expected moe or swiglu"),
        ([*EXPERTS, "channel.score=sigmoid"], {"channel": "moe"}, r"channel: got score=sigmoid, "),
        (
            [*EXPERTS, "channel.bias_update_speed=0.1"],
            {"channel": "moe"},
            r"layer 0, channel: got bias_update_speed=0.1, ",
        ),
        (
            [*EXPERTS, "channel.shared_gate=false"],
            {"channel": "moe"},
            r"layer 0, channel: got shared_gate=false, ",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    model = build_model(*SMALL, *changes, **{**HYBRID, **options})
    with pytest.raises(ValueError, match=f"export to Qwen3-Next: .*{message}"):
        to_qwen3_next(model)
