"""transformers' DeepseekV3 as an independent implementation of the model."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.export.deepseek_v3 import deepseek_v3_config, deepseek_v3_weights, to_deepseek_v3

SMALL = (
    "model.d_model=48",
    "model.n_layers=3",
    "model.n_heads=4",
    "model.head_dim=10",
    "model.ffn_hidden=56",
    "model.init_std=0.2",
    "model.max_seq_len=64",
    "model.norm_eps=1e-6",
    "model.rope_theta=500.0",
    "mixer.q_lora_rank=18",
    "mixer.kv_lora_rank=14",
    "mixer.qk_rope_head_dim=6",
    "mixer.v_head_dim=11",
    "mixer.backend=reference",
    "position.interleaved=true",
)
# One dense layer, then experts: in groups, with a bias that moves choices, shared ones, scaled.
EXPERTS = (
    "stack.channel_pattern=[a,b,b]",
    "channels.b.n_experts=8",
    "channels.b.top_k=3",
    "channels.b.hidden=20",
    "channels.b.score=sigmoid",
    "channels.b.scaling_factor=2.5",
    "channels.b.n_shared=2",
    "channels.b.n_groups=4",
    "channels.b.top_groups=2",
    "channels.b.bias_update_speed=0.001",
    "channels.b.balance_loss=0",
    "channels.b.z_loss=0",
)
PARTS = {"mixer": "mla"}
MIXED = {**PARTS, "channels": {"b": "moe"}}
MODELS = {
    "dense": ((), PARTS),
    "dense_full_query_plain_pairs_tied": (
        (
            "mixer.q_lora_rank=null",
            "position.interleaved=false",
            "model.tie_embeddings=true",
        ),
        PARTS,
    ),
    "experts": (EXPERTS, MIXED),
    "experts_without_bias": (
        (*EXPERTS, "channels.b.bias_update_speed=null", "channels.b.renormalise=false"),
        MIXED,
    ),
}


@pytest.fixture(params=MODELS)
def model(request, build_model, shuffle_norms):
    changes, options = MODELS[request.param]
    model = shuffle_norms(build_model(*SMALL, *changes, **options))
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        assert name.endswith("expert_bias")
        buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def exported(model):
    """Their grouped matrix product has no float64."""
    theirs = to_deepseek_v3(model)
    theirs.set_experts_implementation("eager")
    return theirs


def test_logits_loss_and_gradients(model, float64_norm, same_function):
    float64_norm(DeepseekV3RMSNorm)
    # angles are float32 in both; their router is float32 throughout
    close = {"atol": 2e-6, "rtol": 2e-6}
    same_function(model, exported(model), deepseek_v3_weights, **close)


def test_greedy_generation_token_for_token(model, same_greedy_text):
    """Ours by the absorbed form and a latent cache, theirs by expanded keys and values."""
    same_greedy_text(model, exported(model))


def test_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, *EXPERTS, dtype=torch.float32, **MIXED))
    to_deepseek_v3(model).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_published_671b():
    """The preset's parts are those of the published configuration, whose values are written out;
    37B of its parameters work on a token, and the module that looks ahead is no part of it."""
    config = compose("train", ["experiment=deepseek_v3"])
    model = build.build_model(config, vocab_size=129280, device="meta")
    published = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_shared_experts=1,
        n_routed_experts=256,
        routed_scaling_factor=2.5,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_interleave=True,
        attention_bias=False,
        num_mtp_layers=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert deepseek_v3_config(model).to_dict() == published.to_dict()
    with torch.device("meta"):
        theirs = dict(DeepseekV3ForCausalLM(published).named_parameters())
    ours = deepseek_v3_weights(model)
    assert {n: p.shape for n, p in theirs.items()} == {n: ours[n].shape for n in theirs}
    total = sum(parameter.numel() for parameter in theirs.values())
    assert total == 671_026_404_352
    idle = sum(block.channel.idle_parameters() for block in model.stack.blocks)
    assert 37e9 < total - idle < 38e9


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([], {**PARTS, "mixer": "attention"}, r"layer 0, mixer: got Attention, .*expected mla;"),
        ([], {**PARTS, "channel": "gelu"}, r"channel: got Gelu, .*expected swiglu or moe; train"),
        ([], {**PARTS, "position": "none"}, r"position: got NoPosition, .*expected rope, "),
        (["mixer.norm_eps=0.1"], PARTS, r"layer 0, mixer: got norm_eps=0.1, .*norm_eps=1e-06"),
        (["mixer.softmax_scale=0.1"], PARTS, r"mixer: got scores times 0.1, .*softmax_scale=null"),
        (["channel.bias=true"], PARTS, r"channel=swiglu: got bias=true, .*channel.bias=false"),
        (
            [*EXPERTS, "stack.channel_pattern=[b,a,b]"],
            MIXED,
            r"stack: got a swiglu layer after a moe layer, .*the swiglu layers before",
        ),
        (
            [*EXPERTS, "channels.b.score=softmax_before", "channels.b.bias_update_speed=null"],
            MIXED,
            r"channel=moe: got score=softmax_before, .*channel.score=sigmoid",
        ),
        (
            [*EXPERTS, "channels.b.shared_gate=true"],
            MIXED,
            r"channel=moe: got no shared expert, or one with a gate, .*shared_gate=false",
        ),
        (
            [*EXPERTS, "channels.b.shared_hidden=15"],
            MIXED,
            r"channel=moe: got 30 shared hidden units, .*multiple of an expert's 20",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    def takes(change):
        part = change.partition(".")[0]
        return options.get(part, "").partition("=")[0] not in ("attention", "none")

    model = build_model(*filter(takes, SMALL), *changes, **options)
    with pytest.raises(ValueError, match=f"export to DeepseekV3: .*{message}"):
        to_deepseek_v3(model)
