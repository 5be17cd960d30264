"""Export to transformers' LlamaForCausalLM: rotary attention, SwiGLU, RMSNorm before each.

Weights are copied. Padding rows of the vocabulary are left out; the packed gate and up projection
is split. Whatever else a model is made of has no counterpart in Llama and is refused.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.export import common
from llmtrain.mixers.attention import Attention
from llmtrain.model.language_model import LanguageModel

LLAMA = common.Family("Llama")


def to_llama(model: LanguageModel) -> LlamaForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Llama does not have.
    """
    config = llama_config(model)
    return common.transformers_model(LlamaForCausalLM, config, common.dense_weights(model), model)


def llama_config(model: LanguageModel) -> LlamaConfig:
    """The configuration under which Llama computes what the model does."""
    LLAMA.check_stack(model)
    LLAMA.check_types(model, {Attention: "attention"}, {SwiGLU: "swiglu"})
    LLAMA.check_rope(model)
    LLAMA.check_attention(model, **common.PLAIN_ATTENTION, qk_norm=False)
    LLAMA.check_equal_layers(model)
    block = model.stack.blocks[0]
    return LlamaConfig(
        **common.sizes(model),
        intermediate_size=block.channel.down.in_features,
        num_attention_heads=block.mixer.n_heads,
        num_key_value_heads=block.mixer.n_kv_heads,
        head_dim=block.mixer.head_dim,
        hidden_act="silu",
        rms_norm_eps=LLAMA.check_norms(model),
        rope_parameters=common.plain_rope(model),
        attention_bias=block.mixer.q_proj.bias is not None,
        mlp_bias=block.channel.down.bias is not None,
    )
