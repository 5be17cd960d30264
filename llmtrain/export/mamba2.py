"""Export to transformers' Mamba2ForCausalLM: blocks of one Mamba-2 mixer each, without positions.

Weights are copied; padding rows of the vocabulary are left out. transformers bounds time steps in
whole prompts and not in the single tokens of cached generation: a model whose steps reach a
finite limit generates differently there.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM

from llmtrain.channels.none import NoChannel
from llmtrain.export import common
from llmtrain.mixers.mamba2 import Mamba2
from llmtrain.model.language_model import LanguageModel

MAMBA2 = common.Family("Mamba2")


def to_mamba2(model: LanguageModel) -> Mamba2ForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that Mamba2 does not have.
    """
    config = mamba2_config(model)
    return common.transformers_model(Mamba2ForCausalLM, config, mamba2_weights(model), model)


def mamba2_config(model: LanguageModel) -> Mamba2Config:
    """The configuration under which Mamba2 computes what the model does."""
    MAMBA2.check_stack(model)
    MAMBA2.check_types(model, {Mamba2: "mamba2"}, {NoChannel: "none"})
    check_mixers(model)
    MAMBA2.check_no_positions(model)
    mixer = model.stack.blocks[0].mixer
    return Mamba2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.embedding.weight.shape[1],
        num_hidden_layers=len(model.stack.blocks),
        num_heads=mixer.n_heads,
        head_dim=mixer.head_dim,
        state_size=mixer.d_state,
        expand=mixer.d_inner // model.embedding.weight.shape[1],
        conv_kernel=mixer.d_conv,
        n_groups=mixer.n_groups,
        use_bias=mixer.in_proj.bias is not None,
        use_conv_bias=mixer.conv_bias is not None,
        layer_norm_epsilon=MAMBA2.check_norms(model),
        time_step_min=mixer.dt_min,
        time_step_max=mixer.dt_max,
        time_step_floor=mixer.dt_floor,
        time_step_limit=mixer.dt_limit,
        chunk_size=mixer.chunk,
        tie_word_embeddings=model.embedding.tied,
        residual_in_fp32=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def check_mixers(model: LanguageModel) -> None:
    """ValueError unless all mixers are alike and normalise as Mamba2 does."""
    facts = set()
    for i, block in enumerate(model.stack.blocks):
        place, mixer = f"layer {i}, mixer", block.mixer
        norm = mixer.norm
        got = f"norm_groups={norm.groups}"
        want = f"mixer.norm_groups=null (n_groups, {mixer.n_groups})"
        MAMBA2.require(norm.groups == mixer.n_groups, place, got, want)
        want = "mixer.norm_before_gate=false"
        MAMBA2.require(not norm.before_gate, place, "norm_before_gate=true", want)
        want = f"the last norm's {model.norm.eps} everywhere"
        MAMBA2.require(norm.eps == model.norm.eps, place, f"norm_eps={norm.eps}", want)
        shapes = tuple((name, p.shape) for name, p in mixer.named_parameters())
        facts.add((shapes, mixer.n_groups, mixer.d_state, mixer.dt_limit))
    want = "one shape and one dt_limit for all layers"
    MAMBA2.require(len(facts) == 1, "stack", "layers that differ", want)


def mamba2_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Mamba2's parameter names and our values."""
    weights = {
        "backbone.embeddings.weight": model.embedding.weight[: model.vocab_size],
        "backbone.norm_f.weight": common.final_gain(model),
    }
    if not model.embedding.tied:
        weights["lm_head.weight"] = model.head.weight[: model.vocab_size]
    for i, block in enumerate(model.stack.blocks):
        mixer = block.mixer
        layer = {
            "norm.weight": block.norm1.weight,
            **common.under("mixer", mixer_weights(mixer)),
        }
        weights |= common.under(f"backbone.layers.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}


def mixer_weights(mixer: Mamba2) -> dict[str, Tensor]:
    """A mixer's parameters under transformers' names; their convolution has a dimension of 1."""
    weights = {
        **common.linear_weights(in_proj=mixer.in_proj, out_proj=mixer.out_proj),
        "conv1d.weight": mixer.conv_weight[:, None],
        "A_log": mixer.A_log,
        "D": mixer.D,
        "dt_bias": mixer.dt_bias,
        "norm.weight": mixer.norm.weight,
    }
    if mixer.conv_bias is not None:
        weights["conv1d.bias"] = mixer.conv_bias
    return weights
