"""Export to transformers' DeepseekV3ForCausalLM: latent attention, SwiGLU first, then experts.

Weights are copied, and the buffer of the routing bias. Padding rows of the vocabulary are left out;
packed gate and up projections of SwiGLU layers are split. Modules of multi-token prediction are
left out: they change no next-token logits. Whatever else a model is made of has no counterpart in
DeepseekV3 and is refused.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.channels.moe import MoE
from llmtrain.export import common
from llmtrain.mixers.mla import LatentAttention
from llmtrain.model.language_model import LanguageModel

DEEPSEEK = common.Family("DeepseekV3")
LATENT_EPS = 1e-6  # of the latents' norms, which its configuration cannot change


def to_deepseek_v3(model: LanguageModel) -> DeepseekV3ForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that DeepseekV3 does not have.
    """
    config = deepseek_v3_config(model)
    weights = deepseek_v3_weights(model)
    return common.transformers_model(DeepseekV3ForCausalLM, config, weights, model)


def deepseek_v3_config(model: LanguageModel) -> DeepseekV3Config:
    """The configuration under which DeepseekV3 computes what the model does."""
    DEEPSEEK.check_stack(model)
    DEEPSEEK.check_types(model, {LatentAttention: "mla"}, {SwiGLU: "swiglu", MoE: "moe"})
    interleaved = getattr(model.position, "interleaved", False)
    DEEPSEEK.check_rope(model, interleaved=interleaved)
    mixers = [block.mixer for block in model.stack.blocks]
    check_mixers(mixers)
    mixer, eps = mixers[0], DEEPSEEK.check_norms(model)
    return DeepseekV3Config(
        **common.sizes(model),
        **channel_sizes([block.channel for block in model.stack.blocks]),
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.n_heads,
        q_lora_rank=mixer.q_lora_rank,
        kv_lora_rank=mixer.kv_lora_rank,
        qk_nope_head_dim=mixer.nope,
        qk_rope_head_dim=mixer.rope,
        v_head_dim=mixer.v_head_dim,
        hidden_act="silu",
        rms_norm_eps=eps,
        rope_parameters=common.plain_rope(model),
        rope_interleave=interleaved,
        attention_bias=False,
        num_mtp_layers=0,
    )


def check_mixers(mixers: list[LatentAttention]) -> None:
    """ValueError unless all have the same sizes, the usual scale and the fixed eps."""
    facts = ("n_heads", "q_lora_rank", "kv_lora_rank", "nope", "rope", "v_head_dim")
    shapes = {tuple(getattr(mixer, fact) for fact in facts) for mixer in mixers}
    got, want = "layers of different shapes", "one shape for all mixers"
    DEEPSEEK.require(len(shapes) == 1, "stack", got, want)
    for i, mixer in enumerate(mixers):
        usual = mixer.scale == (mixer.nope + mixer.rope) ** -0.5
        place, want = f"layer {i}, mixer", "mixer.softmax_scale=null, mixer.yarn_factor=null"
        DEEPSEEK.require(usual, place, f"scores times {mixer.scale}", want)
        eps = mixer.kv_norm.eps
        DEEPSEEK.require(
            eps == LATENT_EPS, place, f"norm_eps={eps}", f"mixer.norm_eps={LATENT_EPS}"
        )


def channel_sizes(channels: list[nn.Module]) -> dict[str, object]:
    """Keys about feed-forward layers. ValueError unless dense ones come first, all alike."""
    dense = [channel for channel in channels if type(channel) is SwiGLU]
    experts = [channel for channel in channels if type(channel) is MoE]
    ordered, want = channels == [*dense, *experts], "the swiglu layers before the moe layers"
    DEEPSEEK.require(ordered, "stack", "a swiglu layer after a moe layer", want)
    for channel in dense:
        biased = channel.down.bias is not None
        DEEPSEEK.require(not biased, "channel=swiglu", "bias=true", "channel.bias=false")
    hidden = {channel.down.in_features for channel in dense}
    DEEPSEEK.require(len(hidden) <= 1, "stack", "swiglu layers of different widths", "one width")
    sizes = {"first_k_dense_replace": len(dense)}
    if dense:
        sizes["intermediate_size"] = hidden.pop()
    facts = {tuple(expert_sizes(channel).items()) for channel in experts}
    DEEPSEEK.require(len(facts) <= 1, "stack", "moe layers of different shapes", "one shape")
    return {**sizes, **(dict(facts.pop()) if facts else {})}


def expert_sizes(channel: MoE) -> dict[str, object]:
    """Keys about a layer of experts."""
    router = channel.router
    place = "channel=moe"
    sigmoid = router.score == "sigmoid"
    DEEPSEEK.require(sigmoid, place, f"score={router.score}", "channel.score=sigmoid")
    shared, want = channel.shared, "channel.n_shared of at least 1, channel.shared_gate=false"
    ungated = shared is not None and channel.shared_gate is None
    DEEPSEEK.require(ungated, place, "no shared expert, or one with a gate", want)
    whole = shared.down.in_features % channel.hidden == 0
    got = f"{shared.down.in_features} shared hidden units"
    DEEPSEEK.require(whole, place, got, f"a multiple of an expert's {channel.hidden}")
    return {
        "moe_intermediate_size": channel.hidden,
        "n_routed_experts": channel.n_experts,
        "num_experts_per_tok": channel.top_k,
        "n_shared_experts": shared.down.in_features // channel.hidden,
        "routed_scaling_factor": router.scaling_factor,
        "norm_topk_prob": router.renormalise,
        "n_group": router.n_groups,
        "topk_group": router.top_groups,
    }


def deepseek_v3_weights(model: LanguageModel) -> dict[str, Tensor]:
    """DeepseekV3's names and our values, parameters and buffers."""
    weights = common.outer_weights(model)
    for i, block in enumerate(model.stack.blocks):
        channel = block.channel
        mlp = moe_weights(channel) if type(channel) is MoE else common.swiglu_weights(channel)
        layer = {
            **common.layer_norm_weights(block),
            **common.under("self_attn", latent_weights(block.mixer)),
            **common.under("mlp", mlp),
        }
        weights |= common.under(f"model.layers.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}


def latent_weights(mixer: LatentAttention) -> dict[str, Tensor]:
    weights = common.linear_weights(
        kv_a_proj_with_mqa=mixer.kv_down, kv_b_proj=mixer.kv_up, o_proj=mixer.out_proj
    )
    weights["kv_a_layernorm.weight"] = mixer.kv_norm.weight
    if mixer.q_down is None:
        return {**weights, **common.linear_weights(q_proj=mixer.q_up)}
    weights["q_a_layernorm.weight"] = mixer.q_norm.weight
    return {**weights, **common.linear_weights(q_a_proj=mixer.q_down, q_b_proj=mixer.q_up)}


def moe_weights(channel: MoE) -> dict[str, Tensor]:
    """A router without a bias gets one of zeros, which changes no choice."""
    router = channel.router
    bias_E = router.expert_bias
    if bias_E is None:
        bias_E = router.weight.new_zeros(channel.n_experts)
    return {
        "gate.weight": router.weight,
        "gate.e_score_correction_bias": bias_E,
        "experts.gate_up_proj": channel.gate_up,
        "experts.down_proj": channel.down,
        **common.under("shared_experts", common.swiglu_weights(channel.shared)),
    }
