"""Export to transformers' Qwen3ForCausalLM: as Llama, with a norm over each head of q and k.

Weights are copied. Padding rows of the vocabulary are left out; the packed gate and up projection
is split. Whatever else a model is made of has no counterpart in Qwen3 and is refused.
"""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.export import common
from llmtrain.mixers.attention import Attention
from llmtrain.model.language_model import LanguageModel

QWEN3 = common.Family("Qwen3")


def to_qwen3(model: LanguageModel) -> Qwen3ForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Qwen3 does not have.
    """
    config = qwen3_config(model)
    return common.transformers_model(Qwen3ForCausalLM, config, common.dense_weights(model), model)


def qwen3_config(model: LanguageModel) -> Qwen3Config:
    """The configuration under which Qwen3 computes what the model does."""
    QWEN3.check_stack(model)
    QWEN3.check_types(model, {Attention: "attention"}, {SwiGLU: "swiglu"})
    QWEN3.check_rope(model)
    plain = {**common.PLAIN_ATTENTION, "qk_norm": True, "qk_norm_zero_centered": False}
    QWEN3.check_attention(model, **plain)
    QWEN3.check_equal_layers(model)
    eps = QWEN3.check_norms(model)
    for i, block in enumerate(model.stack.blocks):
        place, got = f"layer {i}, mixer", block.mixer.q_norm.eps
        QWEN3.require(got == eps, place, f"qk_norm_eps={got}", f"mixer.qk_norm_eps={eps}")
        biased = block.channel.down.bias is not None
        QWEN3.require(not biased, f"layer {i}, channel", "bias=true", "channel.bias=false")
    block = model.stack.blocks[0]
    return Qwen3Config(
        **common.sizes(model),
        intermediate_size=block.channel.down.in_features,
        num_attention_heads=block.mixer.n_heads,
        num_key_value_heads=block.mixer.n_kv_heads,
        head_dim=block.mixer.head_dim,
        hidden_act="silu",
        rms_norm_eps=eps,
        rope_parameters=common.plain_rope(model),
        attention_bias=block.mixer.q_proj.bias is not None,
        use_sliding_window=False,
    )
