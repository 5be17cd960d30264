"""Export to transformers' Qwen3NextForCausalLM: Gated DeltaNet and gated attention, MoE or SwiGLU.

Norms are zero-centred but for the one inside Gated DeltaNet. Weights are copied; queries, keys,
values and output gates of a DeltaNet layer, which lie one after the other here, lie together a key
head there, as do betas and decays. Whatever else a model is made of has no counterpart and is
refused.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.channels.moe import MoE
from llmtrain.export import common
from llmtrain.mixers.attention import Attention
from llmtrain.mixers.gated_deltanet import GatedDeltaNet
from llmtrain.model.language_model import LanguageModel

QWEN3_NEXT = common.Family("Qwen3-Next")
ATTENTION = {
    **common.PLAIN_ATTENTION,
    "output_gate": True,
    "qk_norm": True,
    "qk_norm_zero_centered": True,
}
LAYER_TYPES = {GatedDeltaNet: "linear_attention", Attention: "full_attention"}


def to_qwen3_next(model: LanguageModel) -> Qwen3NextForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Qwen3-Next does not have.
    """
    config, weights = qwen3_next_config(model), qwen3_next_weights(model)
    return common.transformers_model(Qwen3NextForCausalLM, config, weights, model)


def qwen3_next_config(model: LanguageModel) -> Qwen3NextConfig:
    """The configuration under which Qwen3-Next computes what the model does."""
    QWEN3_NEXT.check_stack(model)
    QWEN3_NEXT.check_types(
        model,
        {GatedDeltaNet: "gated_deltanet", Attention: "attention"},
        {MoE: "moe", SwiGLU: "swiglu"},
    )
    QWEN3_NEXT.check_rope(model, part=True)
    QWEN3_NEXT.check_attention(model, **ATTENTION)
    eps = QWEN3_NEXT.check_norms(model, zero_centered=True)
    blocks = model.stack.blocks
    return Qwen3NextConfig(
        **common.sizes(model),
        **deltanet_sizes(model, eps),
        **attention_sizes(model, eps),
        **channel_sizes(model),
        layer_types=[LAYER_TYPES[type(block.mixer)] for block in blocks],
        rms_norm_eps=eps,
        rope_parameters={
            **common.plain_rope(model),
            "partial_rotary_factor": model.position.fraction,
        },
    )


def parts(model: LanguageModel, slot: str, cls: type) -> dict[str, nn.Module]:
    """Place -> the mixers or channels (slot) of that class, which must have equal shapes; mixers of
    both classes must be there (transformers' caches need an attention layer)."""
    found = {
        f"layer {i}, {slot}": getattr(block, slot)
        for i, block in enumerate(model.stack.blocks)
        if type(getattr(block, slot)) is cls
    }
    shapes = {tuple((n, p.shape) for n, p in part.named_parameters()) for part in found.values()}
    name = cls.__name__
    there = bool(found) or slot == "channel"
    QWEN3_NEXT.require(there, "stack", f"no {name} layer", "layers of both kinds, as stack=hybrid")
    got = f"{name} layers of different shapes"
    QWEN3_NEXT.require(len(shapes) < 2, "stack", got, "one shape for all of them")
    return found


def deltanet_sizes(model: LanguageModel, eps: float) -> dict[str, object]:
    """linear_...: sizes of the Gated DeltaNet layers."""
    found = parts(model, "mixer", GatedDeltaNet)
    heads = {(mixer.n_heads, mixer.n_v_heads) for mixer in found.values()}
    QWEN3_NEXT.require(len(heads) == 1, "stack", "layers of different heads", "one number for all")
    for place, mixer in found.items():
        for knob, want in (("decay", True), ("output_gate", True), ("allow_neg_eigval", False)):
            got = getattr(mixer, knob)
            texts = (f"{knob}={common.yaml_value(z)}" for z in (got, want))
            QWEN3_NEXT.require(got == want, place, *texts)
        QWEN3_NEXT.require(mixer.conv_bias is None, place, "conv_bias=true", "conv_bias=false")
        got, want = f"norm_eps={mixer.norm.eps}", f"norm_eps={eps}, as everywhere"
        QWEN3_NEXT.require(mixer.norm.eps == eps, place, got, want)
    return {
        "linear_num_key_heads": mixer.n_heads,
        "linear_num_value_heads": mixer.n_v_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.v_width,
        "linear_conv_kernel_dim": mixer.d_conv,
    }


def attention_sizes(model: LanguageModel, eps: float) -> dict[str, object]:
    """Sizes of the attention layers."""
    found = parts(model, "mixer", Attention)
    heads = {(mixer.n_heads, mixer.n_kv_heads) for mixer in found.values()}
    QWEN3_NEXT.require(len(heads) == 1, "stack", "layers of different heads", "one number for all")
    for place, mixer in found.items():
        got, want = f"qk_norm_eps={mixer.q_norm.eps}", f"qk_norm_eps={eps}, as everywhere"
        QWEN3_NEXT.require(mixer.q_norm.eps == eps, place, got, want)
    return {
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
        "attention_bias": mixer.q_proj.bias is not None,
    }


def channel_sizes(model: LanguageModel) -> dict[str, object]:
    """Which layers are dense, and the sizes of both kinds."""
    dense, experts = parts(model, "channel", SwiGLU), parts(model, "channel", MoE)
    kinds = [type(block.channel) for block in model.stack.blocks]
    sizes = {"mlp_only_layers": [i for i, kind in enumerate(kinds) if kind is SwiGLU]}
    for place, channel in dense.items():
        QWEN3_NEXT.require(channel.down.bias is None, place, "bias=true", "channel.bias=false")
        sizes["intermediate_size"] = channel.down.in_features
    top_k, renormalise = set(), set()
    for place, channel in experts.items():
        router = channel.router
        for knob, got, want in (
            ("score", router.score, "softmax_before"),
            ("scaling_factor", router.scaling_factor, 1.0),
            ("top_groups", router.top_groups, router.n_groups),
            ("bias_update_speed", channel.bias_update_speed, None),
        ):
            texts = (f"{knob}={common.yaml_value(z)}" for z in (got, want))
            QWEN3_NEXT.require(got == want, place, *texts)
        gated = channel.shared_gate is not None
        QWEN3_NEXT.require(gated, place, "shared_gate=false", "n_shared=1 and shared_gate=true")
        top_k.add(channel.top_k)
        renormalise.add(router.renormalise)
        sizes |= {
            "num_experts": channel.n_experts,
            "num_experts_per_tok": channel.top_k,
            "norm_topk_prob": router.renormalise,
            "moe_intermediate_size": channel.hidden,
            "shared_expert_intermediate_size": channel.shared.down.in_features,
        }
    same = len(top_k) < 2 and len(renormalise) < 2
    QWEN3_NEXT.require(same, "stack", "channels that choose differently", "one top_k for all")
    return sizes


def qwen3_next_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Qwen3-Next's parameter names and our values."""
    weights = common.outer_weights(model)
    for i, block in enumerate(model.stack.blocks):
        layer = common.layer_norm_weights(block)
        if type(block.mixer) is GatedDeltaNet:
            layer |= common.under("linear_attn", deltanet_weights(block.mixer))
        else:
            layer |= common.under("self_attn", common.attention_weights(block.mixer))
        dense = type(block.channel) is SwiGLU
        channel = common.swiglu_weights if dense else moe_weights
        layer |= common.under("mlp", channel(block.channel))
        weights |= common.under(f"model.layers.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}


def deltanet_weights(mixer: GatedDeltaNet) -> dict[str, Tensor]:
    """Rows of the projections sorted by key heads."""

    def by_key_head(*matrices: Tensor) -> Tensor:
        split = [rearrange(m, "(g rows) d -> g rows d", g=mixer.n_heads) for m in matrices]
        return torch.cat(split, dim=1).flatten(0, 1)

    q, k, v = mixer.qkv_proj.weight.split(mixer.qkv_widths)
    return {
        "in_proj_qkvz.weight": by_key_head(q, k, v, mixer.z_proj.weight),
        "in_proj_ba.weight": by_key_head(mixer.b_proj.weight, mixer.a_proj.weight),
        "conv1d.weight": mixer.conv_weight[:, None],
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.A_log,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out_proj.weight,
    }


def moe_weights(channel: MoE) -> dict[str, Tensor]:
    return {
        "gate.weight": channel.router.weight,
        "experts.gate_up_proj": channel.gate_up,
        "experts.down_proj": channel.down,
        "shared_expert_gate.weight": channel.shared_gate.weight,
        **common.under("shared_expert", common.swiglu_weights(channel.shared)),
    }
