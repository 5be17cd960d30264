"""Export to transformers' MixtralForCausalLM: rotary attention, and experts in every layer.

Weights are copied; experts are packed as there. Padding rows of the vocabulary are left out. The
coefficient of the balance loss goes along, but that loss is another: transformers takes the shares
over the tokens of all layers together and counts every choice as a token, which makes it top_k
times as large. Whatever else a model is made of has no counterpart in Mixtral and is refused.
"""

from __future__ import annotations

from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from llmtrain.channels.moe import MoE
from llmtrain.export import common
from llmtrain.mixers.attention import Attention
from llmtrain.model.language_model import LanguageModel

MIXTRAL = common.Family("Mixtral")


def to_mixtral(model: LanguageModel) -> MixtralForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Mixtral does not have.
    """
    config = mixtral_config(model)
    return common.transformers_model(MixtralForCausalLM, config, mixtral_weights(model), model)


def mixtral_config(model: LanguageModel) -> MixtralConfig:
    """The configuration under which Mixtral computes what the model does."""
    MIXTRAL.check_stack(model)
    MIXTRAL.check_types(model, {Attention: "attention"}, {MoE: "moe"})
    MIXTRAL.check_rope(model)
    window = model.stack.blocks[0].mixer.window
    plain = {**common.PLAIN_ATTENTION, "window": window}  # the same window in every layer
    MIXTRAL.check_attention(model, **plain, qk_norm=False)
    for i, block in enumerate(model.stack.blocks):
        biased = block.mixer.q_proj.bias is not None
        MIXTRAL.require(not biased, f"layer {i}, mixer", "bias=true", "mixer.bias=false")
        check_experts(block.channel, f"layer {i}, channel")
    MIXTRAL.check_equal_layers(model)
    choices = {block.channel.top_k for block in model.stack.blocks}
    MIXTRAL.require(len(choices) == 1, "stack", "layers of different top_k", "one top_k for all")
    block = model.stack.blocks[0]
    return MixtralConfig(
        **common.sizes(model),
        intermediate_size=block.channel.hidden,
        num_attention_heads=block.mixer.n_heads,
        num_key_value_heads=block.mixer.n_kv_heads,
        head_dim=block.mixer.head_dim,
        num_local_experts=block.channel.n_experts,
        num_experts_per_tok=block.channel.top_k,
        router_aux_loss_coef=block.channel.balance_coefficient,
        hidden_act="silu",
        rms_norm_eps=MIXTRAL.check_norms(model),
        rope_parameters=common.plain_rope(model),
        sliding_window=window,
    )


def check_experts(channel: MoE, place: str) -> None:
    """ValueError unless weights are a softmax over the chosen, and nothing else is added."""
    router = channel.router
    MIXTRAL.require(
        router.score != "sigmoid", place, "score=sigmoid", "channel.score=softmax_before"
    )
    for knob, got, want in (
        ("renormalise", router.renormalise, True),
        ("scaling_factor", router.scaling_factor, 1.0),
        ("top_groups", router.top_groups, router.n_groups),
        ("bias_update_speed", channel.bias_update_speed, None),
        ("n_shared", int(channel.shared is not None), 0),
    ):
        texts = (f"channel.{knob}={common.yaml_value(value)}" for value in (got, want))
        MIXTRAL.require(got == want, place, *texts)


def mixtral_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Mixtral's parameter names and our values."""
    weights = common.outer_weights(model)
    for i, block in enumerate(model.stack.blocks):
        layer = {
            **common.layer_norm_weights(block),
            **common.under("self_attn", common.attention_weights(block.mixer)),
            "mlp.gate.weight": block.channel.router.weight,
            "mlp.experts.gate_up_proj": block.channel.gate_up,
            "mlp.experts.down_proj": block.channel.down,
        }
        weights |= common.under(f"model.layers.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}
