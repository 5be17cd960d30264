"""What the exports to transformers share: refusals, checks and the copying of weights.

A family's file says which parts its model has (`Family.check_...`), writes the configuration, and
maps its parameter names to ours (`linear_weights` and those after it); transformers_model does the
rest. What a model has and the family lacks is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmtrain.channels.mlp import SwiGLU
from llmtrain.mixers.attention import Attention
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.norm import RMSNorm
from llmtrain.model.position import Learned, Rope, Sinusoidal
from llmtrain.model.stack import Stack

Theirs = TypeVar("Theirs", bound=PreTrainedModel)
# Attention's knobs at the values that plain softmax attention has.
PLAIN_ATTENTION = {
    "window": None,
    "sinks": 0,
    "softcap": None,
    "output_gate": False,
    "qk_bias": False,
}


@dataclass(frozen=True)
class Family:
    """name: of the family, for messages. Every check raises ValueError by `require`."""

    name: str

    def require(self, holds: bool, place: str, got: str, expected: str) -> None:
        """ValueError, saying what the model has and the family lacks, unless it holds."""
        if not holds:
            raise ValueError(
                f"export to {self.name}: {place}: got {got}, which {self.name} does not have, "
                f"expected {expected}; train with that, or keep the checkpoint in its own format"
            )

    def check_stack(self, model: LanguageModel, *, softcap: bool = False) -> None:
        """An embedding without scale; blocks with norms before their parts, each applied once.
        softcap: the head may cap its logits."""
        scale, stack = model.embedding.scale, model.stack
        self.require(scale in (None, 1), "embedding", f"scale={scale}", "embedding.scale=null")
        cap, want = model.embedding.logit_softcap, "embedding.logit_softcap=null"
        self.require(softcap or cap is None, "embedding", f"logit_softcap={cap}", want)
        for block in stack.blocks:
            place = getattr(block, "norm_position", "of a shared block")
            self.require(place == "pre", "stack", f"norm_position={place}", "norm_position=pre")
        once = type(stack) is Stack and len(stack.order) == len(stack.blocks)
        self.require(
            once, "stack", "blocks applied more than once", "stack=decoder, stack.shared=null"
        )

    def check_types(
        self, model: LanguageModel, mixers: Mapping[type, str], channels: Mapping[type, str]
    ) -> None:
        """Mixers and channels of these classes (with the names of their options) alone."""
        for i, block in enumerate(model.stack.blocks):
            for kind, part, allowed in (
                ("mixer", block.mixer, mixers),
                ("channel", block.channel, channels),
            ):
                got, names = type(part).__name__, " or ".join(allowed.values())
                self.require(type(part) in allowed, f"layer {i}, {kind}", got, names)

    def check_norms(self, model: LanguageModel, *, zero_centered: bool = False) -> float:
        """RMSNorms of one eps, which is returned, around the blocks and at the end."""
        norms = {}
        for i, block in enumerate(model.stack.blocks):
            norms |= {f"layer {i}, norm1": block.norm1, f"layer {i}, norm2": block.norm2}
        norms["norm"], eps = model.norm, model.norm.eps
        for place, norm in norms.items():
            if norm is None:  # channel=none has no second norm
                continue
            self.require(type(norm) is RMSNorm, place, type(norm).__name__, "norm=rmsnorm")
            same = norm.eps == eps
            self.require(same, place, f"eps={norm.eps}", f"the last norm's {eps} everywhere")
            got, want = yaml_value(norm.zero_centered), yaml_value(zero_centered)
            self.require(got == want, place, f"zero_centered={got}", f"norm.zero_centered={want}")
        return eps

    def check_rope(
        self, model: LanguageModel, *, interleaved: bool = False, part: bool = False
    ) -> None:
        """Unscaled rotary positions; part: a fraction of the head may be turned."""
        position = model.position
        expected = "rope, interleaved" if interleaved else "rope, not interleaved"
        is_rope = type(position) is Rope and position.interleaved == interleaved
        self.require(is_rope, "position", type(position).__name__, expected)
        plain = position.scaling == "none"
        self.require(plain, "position", "scaled frequencies", "position.scaling=none")
        whole = part or position.fraction == 1.0
        self.require(whole, "position", "a partly rotated head", "position.fraction=1.0")

    def check_no_positions(self, model: LanguageModel) -> None:
        """No positions are added to the embedding; angles do nothing, as no mixer reads them."""
        added = isinstance(model.position, Learned | Sinusoidal)
        self.require(not added, "position", type(model.position).__name__, "position=none")

    def check_attention(self, model: LanguageModel, **expected: object) -> None:
        """Every Attention has these values of its knobs (by name, as its attributes)."""
        for i, block in enumerate(model.stack.blocks):
            mixer = block.mixer
            if not isinstance(mixer, Attention):
                continue
            for knob, value in expected.items():
                got = getattr(mixer, knob)
                want = f"mixer.{knob}={yaml_value(value)}"
                place = f"layer {i}, mixer"
                self.require(got == value, place, f"{knob}={yaml_value(got)}", want)
            scale = mixer.softmax_scale
            usual = scale in (None, mixer.head_dim**-0.5)
            place, want = f"layer {i}, mixer", "mixer.softmax_scale=null"
            self.require(usual, place, f"softmax_scale={scale}", want)

    def check_equal_layers(self, model: LanguageModel) -> None:
        """All blocks have parameters of the same names and shapes, and as many heads."""
        blocks = model.stack.blocks
        shapes = {tuple((n, p.shape) for n, p in b.named_parameters()) for b in blocks}
        heads = {(b.mixer.n_heads, b.mixer.n_kv_heads) for b in blocks}
        one = len(shapes) == len(heads) == 1
        got, want = "layers of different shapes", "one shape for all layers"
        self.require(one, "stack", got, want)


def yaml_value(value: object) -> str:
    """As a user would write it."""
    return "null" if value is None else str(value).lower()


def transformers_model(
    cls: type[Theirs],
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    model: LanguageModel,
) -> Theirs:
    """cls(config) with copies of the weights, in their dtype and device, in eval mode."""
    with torch.device("meta"):
        theirs = cls(config)
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    theirs = theirs.to(dtype).to_empty(device=device)
    # frequencies are buffers outside of the state dict, and to_empty left them unfilled
    for parent in list(theirs.modules()):
        rotary = getattr(parent, "rotary_emb", None)
        if isinstance(rotary, nn.Module):
            parent.rotary_emb = type(rotary)(config).to(device)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    left = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert not left | set(unexpected), (left, unexpected)
    theirs.tie_weights()
    return theirs.eval()


def sizes(model: LanguageModel) -> dict[str, object]:
    """The keys that every family's configuration shares."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embedding.weight.shape[1],
        "num_hidden_layers": len(model.stack.blocks),
        "max_position_embeddings": model.position.max_seq_len,
        "tie_word_embeddings": model.embedding.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def plain_rope(model: LanguageModel) -> dict[str, object]:
    """rope_parameters of unscaled rotary positions."""
    return {"rope_type": "default", "rope_theta": model.position.theta}


def linear_weights(**modules: nn.Linear) -> dict[str, Tensor]:
    """name.weight, and name.bias where there is one; `__` in a name stands for a dot."""
    return {
        f"{name.replace('__', '.')}.{kind}": value
        for name, module in modules.items()
        for kind, value in (("weight", module.weight), ("bias", module.bias))
        if value is not None
    }


def attention_weights(mixer: Attention) -> dict[str, Tensor]:
    """Projections and the norms of queries and keys, as Llama's successors name them."""
    weights = linear_weights(
        q_proj=mixer.q_proj, k_proj=mixer.k_proj, v_proj=mixer.v_proj, o_proj=mixer.out_proj
    )
    if mixer.q_norm is not None:
        weights["q_norm.weight"] = mixer.q_norm.weight
        weights["k_norm.weight"] = mixer.k_norm.weight
    return weights


def swiglu_weights(channel: SwiGLU) -> dict[str, Tensor]:
    """The packed gate and up projection, split."""
    weights = linear_weights(down_proj=channel.down)
    for name, packed in linear_weights(packed=channel.gate_up).items():
        kind = name.rpartition(".")[2]
        weights[f"gate_proj.{kind}"], weights[f"up_proj.{kind}"] = packed.chunk(2)
    return weights


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with a prefix and a dot before their names."""
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def outer_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Embedding, last norm and head; rows that pad the vocabulary are left out."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight[: model.vocab_size],
        "model.norm.weight": final_gain(model),
    }
    if not model.embedding.tied:
        weights["lm_head.weight"] = model.head.weight[: model.vocab_size]
    return weights


def final_gain(model: LanguageModel) -> Tensor:
    """Of the last norm, with the factor of the logits (muP) taken in: all that the head reads comes
    from this norm, whether its weight is the embedding's or not."""
    norm, scale = model.norm, model.logit_scale
    if scale == 1:
        return norm.weight
    return (1 + norm.weight) * scale - 1 if norm.zero_centered else norm.weight * scale


def dense_weights(model: LanguageModel) -> dict[str, Tensor]:
    """All weights of a model of Attention and SwiGLU, as Llama names them."""
    weights = outer_weights(model)
    for i, block in enumerate(model.stack.blocks):
        layer = {
            **layer_norm_weights(block),
            **under("self_attn", attention_weights(block.mixer)),
            **under("mlp", swiglu_weights(block.channel)),
        }
        weights |= under(f"model.layers.{i}", layer)
    return {name: value.detach() for name, value in weights.items()}


def layer_norm_weights(block: nn.Module) -> dict[str, Tensor]:
    """The norms before a block's two parts, as Llama's successors name them."""
    return {
        "input_layernorm.weight": block.norm1.weight,
        "post_attention_layernorm.weight": block.norm2.weight,
    }
