"""transformers' Qwen3 as an independent implementation of the model."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from llmtrain.context import SequenceContext
from llmtrain.export.common import dense_weights
from llmtrain.export.qwen3 import qwen3_config, to_qwen3

SMALL = (
    "model.d_model=48",
    "model.n_layers=3",
    "model.n_heads=6",
    "model.n_kv_heads=2",
    "model.head_dim=10",
    "model.ffn_hidden=56",
    "model.init_std=0.2",
    "model.max_seq_len=64",
    "model.norm_eps=1e-6",
    "model.rope_theta=500.0",
    "mixer.qk_norm=true",
    "mixer.backend=reference",
)
TIED = ("model.tie_embeddings=true", "model.tie_embeddings=false")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", TIED)
def test_logits_loss_and_gradients(
    build_model, shuffle_norms, float64_norm, same_function, tied, bias
):
    """Heads of 10, not of 48 / 6."""
    float64_norm(Qwen3RMSNorm)
    model = shuffle_norms(build_model(*SMALL, tied, f"mixer.bias={bias}"))
    same_function(model, to_qwen3(model), dense_weights, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("tied", TIED)
def test_greedy_generation_token_for_token(build_model, shuffle_norms, same_greedy_text, tied):
    model = shuffle_norms(build_model(*SMALL, tied))
    same_greedy_text(model, to_qwen3(model))


def test_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, TIED[0], dtype=torch.float32))
    to_qwen3(model).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=2e-5, rtol=1e-4)


def test_published_sizes(build_model):
    """The configuration of Qwen3-0.6B, whose heads are wider than d_model / n_heads."""
    sizes = {
        "d_model": 1024,
        "n_layers": 28,
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden": 3072,
        "tie_embeddings": True,
        "norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_seq_len": 40960,
    }
    changes = [f"model.{key}={value}" for key, value in sizes.items()]
    options = {"vocab_size": 151936, "device": "meta", "dtype": torch.float32}
    model = build_model(*changes, "mixer.qk_norm=true", **options)
    published = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert qwen3_config(model).to_dict() == published.to_dict()
    assert sum(p.numel() for p in model.parameters()) == 596_049_920


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["mixer.qk_norm=false"], {}, r"layer 0, mixer: got qk_norm=false, .*mixer.qk_norm=true"),
        (["mixer.qk_norm_eps=0.1"], {}, r"layer 0, mixer: got qk_norm_eps=0.1, .*eps=1e-06"),
        (["mixer.qk_norm_zero_centered=true"], {}, r"got qk_norm_zero_centered=true, "),
        (["norm.zero_centered=true"], {}, r"norm1: got zero_centered=true, .*norm.zero_centered=f"),
        (["mixer.output_gate=true"], {}, r"mixer: got output_gate=true, .*output_gate=false"),
        (["mixer.softcap=9.0"], {}, r"mixer: got softcap=9.0, .*mixer.softcap=null"),
        (["mixer.window=9", "mixer.sinks=1"], {}, r"mixer: got window=9, .*mixer.window=null"),
        (["channel.bias=true"], {}, r"layer 0, channel: got bias=true, .*channel.bias=false"),
        ([], {"position": "none"}, r"position: got NoPosition, .*expected rope, not interleaved"),
        ([], {"channel": "gelu"}, r"layer 0, channel: got Gelu, .*expected swiglu; train with"),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    model = build_model(*SMALL, *changes, **options)
    with pytest.raises(ValueError, match=f"export to Qwen3: .*{message}"):
        to_qwen3(model)
