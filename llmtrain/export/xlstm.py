"""Export to transformers' xLSTMForCausalLM (xLSTM-7B): mLSTM, SwiGLU, RMSNorm before each, a
soft-capped head.

Weights are copied; padding rows of the vocabulary are left out, packed projections are split, and
a tied head becomes a weight of its own, which is how that class stores it. Whatever else a model is
made of has no counterpart there and is refused. Its cached generation needs qk and v widths that
are multiples of 64.
"""

from __future__ import annotations

from torch import Tensor
from transformers import xLSTMConfig, xLSTMForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.export import common
from llmtrain.mixers.mlstm import MLSTM
from llmtrain.model.language_model import LanguageModel

XLSTM = common.Family("xLSTM")
PUBLISHED_FFN = (2.667, 64)  # factor of the width, and what the result is rounded up to


def to_xlstm(model: LanguageModel) -> xLSTMForCausalLM:
    """The same function of tokens, in the parameters' dtype and device, in eval mode.

    ValueError naming the part that xLSTM does not have.
    """
    config = xlstm_config(model)
    return common.transformers_model(xLSTMForCausalLM, config, xlstm_weights(model), model)


def xlstm_config(model: LanguageModel) -> xLSTMConfig:
    """The configuration under which xLSTM computes what the model does."""
    XLSTM.check_stack(model, softcap=True)
    XLSTM.check_types(model, {MLSTM: "mlstm"}, {SwiGLU: "swiglu"})
    eps = XLSTM.check_norms(model)
    check_parts(model, eps)
    d_model, block = model.embedding.weight.shape[1], model.stack.blocks[0]
    mixer, ffn_hidden = block.mixer, block.channel.down.in_features
    factor, multiple = PUBLISHED_FFN
    if -(-d_model * factor // multiple) * multiple != ffn_hidden:
        factor, multiple = share(ffn_hidden, d_model), 1
    return xLSTMConfig(
        vocab_size=model.vocab_size,
        hidden_size=d_model,
        num_hidden_layers=len(model.stack.blocks),
        num_heads=mixer.n_heads,
        qk_dim_factor=share(mixer.qk_width, d_model),
        v_dim_factor=share(mixer.v_width, d_model),
        ffn_proj_factor=factor,
        ffn_round_up_to_multiple_of=multiple,
        norm_eps=eps,
        gate_soft_cap=float(mixer.gate_soft_cap),
        output_logit_soft_cap=float(model.embedding.logit_softcap),
        chunk_size=mixer.chunk,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def share(width: int, d_model: int) -> float:
    """A factor f with int(d_model * f) == width, the plain quotient where rounding permits."""
    exact = width / d_model
    return exact if int(d_model * exact) == width else (width + 0.5) / d_model


def check_parts(model: LanguageModel, eps: float) -> None:
    """ValueError unless mixers, channels, positions and head are as xLSTM has them, all alike."""
    XLSTM.check_no_positions(model)
    capped = model.embedding.logit_softcap is not None
    want = "a number (30 in xLSTM-7B)"
    XLSTM.require(capped, "embedding", "logit_softcap=null", f"embedding.logit_softcap={want}")
    facts = set()
    for i, block in enumerate(model.stack.blocks):
        place, mixer = f"layer {i}, mixer", block.mixer
        got = f"input_gate={mixer.input_gate}"
        XLSTM.require(mixer.input_gate == "exp", place, got, "mixer.input_gate=exp")
        got = f"d_conv={mixer.d_conv}"
        XLSTM.require(mixer.d_conv is None, place, got, "mixer.d_conv=null")
        capped = mixer.gate_soft_cap is not None
        want = "mixer.gate_soft_cap=15.0 or another number"
        XLSTM.require(capped, place, "gate_soft_cap=null", want)
        XLSTM.require(mixer.q_proj.bias is None, place, "bias=true", "mixer.bias=false")
        got = f"head_norm={mixer.norm.kind}"
        XLSTM.require(mixer.norm.kind == "layernorm", place, got, "mixer.head_norm=layernorm")
        got = f"norm_eps={mixer.norm.eps}"
        XLSTM.require(mixer.norm.eps == eps, place, got, f"the other norms' {eps}")
        plain = block.channel.down.bias is None
        XLSTM.require(plain, f"layer {i}, channel", "bias=true", "channel.bias=false")
        shapes = tuple((name, p.shape) for name, p in block.named_parameters())
        facts.add((shapes, mixer.n_heads, mixer.gate_soft_cap))
    want = "one shape and one gate_soft_cap for all layers"
    XLSTM.require(len(facts) == 1, "stack", "layers that differ", want)


def xlstm_weights(model: LanguageModel) -> dict[str, Tensor]:
    """xLSTM's parameter names and our values."""
    head = model.embedding if model.embedding.tied else model.head
    weights = {
        "backbone.embeddings.weight": model.embedding.weight[: model.vocab_size],
        "backbone.out_norm.weight": common.final_gain(model),
        "lm_head.weight": head.weight[: model.vocab_size],
    }
    for i, block in enumerate(model.stack.blocks):
        ffn = common.swiglu_weights(block.channel)
        layer = {
            "norm_mlstm.weight": block.norm1.weight,
            "norm_ffn.weight": block.norm2.weight,
            "ffn.proj_up_gate.weight": ffn["gate_proj.weight"],
            "ffn.proj_up.weight": ffn["up_proj.weight"],
            "ffn.proj_down.weight": ffn["down_proj.weight"],
            **common.under("mlstm_layer", mixer_weights(block.mixer)),
        }
        weights |= common.under(f"backbone.blocks.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}


def mixer_weights(mixer: MLSTM) -> dict[str, Tensor]:
    """A mixer's parameters under transformers' names."""
    weights = common.linear_weights(
        q=mixer.q_proj,
        k=mixer.k_proj,
        v=mixer.v_proj,
        ogate_preact=mixer.o_proj,
        out_proj=mixer.out_proj,
    )
    weights["multihead_norm.weight"] = mixer.norm.weight
    for kind, packed in (("weight", mixer.gate_proj.weight), ("bias", mixer.gate_bias)):
        weights[f"igate_preact.{kind}"], weights[f"fgate_preact.{kind}"] = packed.chunk(2)
    return weights
