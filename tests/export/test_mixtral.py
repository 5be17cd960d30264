"""transformers' Mixtral as an independent implementation of the model.

Losses are compared without the balance loss, which transformers takes over all layers together
(tests/channels/test_moe.py compares it for one layer).
"""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from llmtrain.context import SequenceContext
from llmtrain.export.mixtral import mixtral_config, mixtral_weights, to_mixtral

SMALL = (
    "model.d_model=48",
    "model.n_layers=3",
    "model.n_heads=6",
    "model.n_kv_heads=2",
    "model.head_dim=10",
    "model.ffn_hidden=56",
    "model.init_std=0.2",
    "model.max_seq_len=64",
    "model.rope_theta=500.0",
    "mixer.backend=reference",
    "channel.n_experts=5",
    "channel.balance_loss=0.0",
    "channel.z_loss=0.0",
)
MODELS = {
    "mixtral": (),
    "window": ("mixer.window=7",),
    "three_of_five_tied": (
        "channel.top_k=3",
        "channel.score=softmax_after",
        "model.tie_embeddings=true",
    ),
}


@pytest.fixture(params=MODELS)
def model(request, build_model, shuffle_norms):
    return shuffle_norms(build_model(*SMALL, *MODELS[request.param], channel="moe"))


def exported(model):
    """Their grouped matrix product has no float64."""
    theirs = to_mixtral(model)
    theirs.set_experts_implementation("eager")
    return theirs


def test_logits_loss_and_gradients(model, float64_norm, same_function):
    float64_norm(MixtralRMSNorm)
    # angles are float32 in both, and the softmax of their router
    same_function(model, exported(model), mixtral_weights, atol=2e-6, rtol=2e-6)


def test_greedy_generation_token_for_token(model, same_greedy_text):
    same_greedy_text(model, exported(model))


def test_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, channel="moe", dtype=torch.float32))
    to_mixtral(model).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_published_8x7b():
    """The sizes of the preset are those under which transformers counts the published number."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from llmtrain.accounting import active_parameters
    from llmtrain.build import build_model
    from llmtrain.config import compose

    config = compose("train", ["experiment=mixtral_8x7b"])
    model = build_model(config, vocab_size=32000, device="meta")
    published = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert mixtral_config(model).to_dict() == published.to_dict()
    with torch.device("meta"):
        assert MixtralForCausalLM(published).num_parameters() == 46_702_792_704
    assert active_parameters(model) == 12_879_925_248  # "13B" in the paper


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([], {"channel": "swiglu"}, r"layer 0, channel: got SwiGLU, .*expected moe; train with"),
        ([], {"position": "none"}, r"position: got NoPosition, .*expected rope, not interleaved"),
        (["mixer.bias=true"], {}, r"layer 0, mixer: got bias=true, .*expected mixer.bias=false"),
        (["mixer.qk_norm=true"], {}, r"layer 0, mixer: got qk_norm=true, .*mixer.qk_norm=false"),
        (["channel.score=sigmoid"], {}, r"layer 0, channel: got score=sigmoid, .*softmax_before"),
        (["channel.renormalise=false"], {}, r"got channel.renormalise=false, .*renormalise=true"),
        (["channel.scaling_factor=2.5"], {}, r"got channel.scaling_factor=2.5, .*factor=1.0"),
        (["channel.bias_update_speed=0.1"], {}, r"got channel.bias_update_speed=0.1, .*=null"),
        (["channel.n_shared=1"], {}, r"got channel.n_shared=1, .*expected channel.n_shared=0"),
        (
            ["channel.n_experts=4", "channel.n_groups=2", "channel.top_groups=1"],
            {},
            r"got channel.top_groups=1, .*expected channel.top_groups=2",
        ),
        (
            ["stack.channel_pattern=[a,b,a]", "channels.b.top_k=3", "channels.b.n_experts=5"],
            {"channels": {"b": "moe"}},
            r"stack: got layers of different top_k, .*expected one top_k for all",
        ),
        (
            ["stack.channel_pattern=[a,b,a]", "channels.b.n_experts=6"],
            {"channels": {"b": "moe"}},
            r"stack: got layers of different shapes, .*expected one shape for all layers",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    small = SMALL if options.get("channel") is None else SMALL[:10]
    options = {"channel": "moe", **options}
    model = build_model(*small, *changes, **options)
    with pytest.raises(ValueError, match=f"export to Mixtral: .*{message}"):
        to_mixtral(model)
