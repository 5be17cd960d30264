"""Export to transformers' LlamaForCausalLM: rotary attention, SwiGLU, RMSNorm before each.

Weights are copied. Padding rows of the vocabulary are left out; the packed gate and up projection
is split. Whatever else a model is made of has no counterpart in Llama and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.mixers.attention import Attention
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.norm import RMSNorm
from llmtrain.model.position import Rope


def to_llama(model: LanguageModel) -> LlamaForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Llama does not have.
    """
    config = llama_config(model)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    llama = llama.to(dtype).to_empty(device=device)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config).to(device)
    llama.load_state_dict(llama_weights(model), strict=not config.tie_word_embeddings)
    llama.tie_weights()
    return llama.eval()


def llama_config(model: LanguageModel) -> LlamaConfig:
    """The configuration under which Llama computes what the model does."""
    check(model)
    block, position = model.stack.blocks[0], model.position
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embedding.weight.shape[1],
        intermediate_size=block.channel.down.in_features,
        num_hidden_layers=len(model.stack.blocks),
        num_attention_heads=block.mixer.n_heads,
        num_key_value_heads=block.mixer.n_kv_heads,
        head_dim=block.mixer.head_dim,
        hidden_act="silu",
        max_position_embeddings=position.max_seq_len,
        rms_norm_eps=model.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta(position)},
        attention_bias=block.mixer.q_proj.bias is not None,
        mlp_bias=block.channel.down.bias is not None,
        tie_word_embeddings=model.embedding.tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def rope_theta(position: Rope) -> float:
    """The base of the frequencies theta^(-i/R): the one that is 1 / frequency R."""
    (frequencies_R,) = position.frequencies.values()
    count = len(frequencies_R)
    if count == 1:
        return 10000.0  # one pair turns by one radian a token, whatever the base
    theta = float(frequencies_R[1]) ** -count
    plain_R = theta ** (-torch.arange(count, dtype=torch.float64) / count)
    if position.scale != 1.0 or not torch.allclose(plain_R, frequencies_R, rtol=1e-9):
        raise no_counterpart("position", "scaled frequencies", "position.scaling=none")
    return round(theta, 6)


def llama_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Llama's parameter names and our values."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight[: model.vocab_size],
        "model.norm.weight": model.norm.weight,
    }
    if not model.embedding.tied:
        weights["lm_head.weight"] = model.head.weight[: model.vocab_size]
    for i, block in enumerate(model.stack.blocks):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = block.norm1.weight
        weights[f"{layer}.post_attention_layernorm.weight"] = block.norm2.weight
        for kind in ("weight", "bias"):
            for theirs, ours in (
                ("q_proj", block.mixer.q_proj),
                ("k_proj", block.mixer.k_proj),
                ("v_proj", block.mixer.v_proj),
                ("o_proj", block.mixer.out_proj),
            ):
                if getattr(ours, kind) is not None:
                    weights[f"{layer}.self_attn.{theirs}.{kind}"] = getattr(ours, kind)
            if getattr(block.channel.gate_up, kind) is not None:
                gate, up = getattr(block.channel.gate_up, kind).chunk(2)
                weights[f"{layer}.mlp.gate_proj.{kind}"] = gate
                weights[f"{layer}.mlp.up_proj.{kind}"] = up
                weights[f"{layer}.mlp.down_proj.{kind}"] = getattr(block.channel.down, kind)
    return {name: value.detach() for name, value in weights.items()}


def check(model: LanguageModel) -> None:
    """ValueError for the first part that Llama does not have."""
    position, stack = model.position, model.stack
    if type(position) is not Rope or position.interleaved:
        raise no_counterpart("position", type(position).__name__, "rope, not interleaved")
    if model.embedding.scale not in (None, 1):
        raise no_counterpart("embedding", f"scale={model.embedding.scale}", "embedding.scale=null")
    if stack.normalises_output:
        raise no_counterpart("stack", "norm_position=post", "norm_position=pre")
    if len(stack.order) != len(stack.blocks):
        raise no_counterpart("stack", "a repeated core", "stack.repeats=1")
    for i, block in enumerate(stack.blocks):
        place, mixer = f"layer {i}", block.mixer
        if type(mixer) is not Attention:
            raise no_counterpart(f"{place}, mixer", type(mixer).__name__, "attention")
        if mixer.window is not None:
            raise no_counterpart(f"{place}, mixer", f"window={mixer.window}", "mixer.window=null")
        if mixer.q_norm is not None:
            raise no_counterpart(f"{place}, mixer", "qk_norm=true", "mixer.qk_norm=false")
        if mixer.softmax_scale not in (None, mixer.head_dim**-0.5):
            got = f"softmax_scale={mixer.softmax_scale}"
            raise no_counterpart(f"{place}, mixer", got, "mixer.softmax_scale=null")
        if position.fraction != 1.0:
            raise no_counterpart("position", "a partly rotated head", "position.fraction=1.0")
        if type(block.channel) is not SwiGLU:
            raise no_counterpart(f"{place}, channel", type(block.channel).__name__, "swiglu")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("norm", "norm1", "norm2") and type(module) is not RMSNorm:
            raise no_counterpart(name, type(module).__name__, "norm=rmsnorm")
    shapes = {tuple((n, p.shape) for n, p in b.named_parameters()) for b in stack.blocks}
    heads = {(b.mixer.n_heads, b.mixer.n_kv_heads, b.norm1.eps, b.norm2.eps) for b in stack.blocks}
    if len(shapes) > 1 or len(heads) > 1 or heads.pop()[2:] != (model.norm.eps, model.norm.eps):
        raise no_counterpart("stack", "layers of different shapes", "one shape for all layers")


def no_counterpart(place: str, got: str, expected: str) -> ValueError:
    return ValueError(
        f"export to Llama: {place}: got {got}, which Llama does not have, expected {expected}; "
        "train with that, or keep the checkpoint in its own format"
    )
