"""The architectures that are compared, and their widths at equal parameters.

What counts is the body: every parameter outside the embedding (and the head tied to it), of which
a token uses all, except in a mixture of experts: there, those that it uses. The yardstick is
attention with a SwiGLU of 8/3 d_model; every other arm gets the width of the channel part that
brings its body to the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import OmegaConf

from llmtrain import build
from llmtrain.accounting import parameters_by_part
from llmtrain.config import compose, hydra_compose
from llmtrain.model.language_model import LanguageModel
from llmtrain.validate import READ_BY_BUILD, interpolated

TOLERANCE = 0.02  # of the body
OUTSIDE = ("embedding", "position", "head")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """overrides: of `llmtrain train`; small: further ones of the synthetic parts; large: of the
    books. In all of them {half} and {quarter} are shares of the width, {root} its square root.
    patterns: number of layers -> letters of a hybrid's stack. sequential: steps token by token, so
    it takes long and is not compiled.

    small gives Mamba-2, gated DeltaNet and mLSTM states of one size, width^2 / 2 numbers a layer
    with two heads.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    small: tuple[str, ...] = ()
    large: tuple[str, ...] = ()
    patterns: dict[int, str] | None = None
    sequential: bool = False

    def chosen(self, *, width: int, layers: int, synthetic: bool) -> list[str]:
        """The overrides for a model of that size."""
        shares = {"half": width // 2, "quarter": width // 4, "root": width**0.5}
        further = self.small if synthetic else self.large
        chosen = [text.format(**shares) for text in (*self.overrides, *further)]
        if self.patterns is None:
            return chosen
        if layers not in self.patterns:
            raise ValueError(
                f"{self.name}: got {layers} layers, expected {', '.join(map(str, self.patterns))}, "
                "the numbers that it has a pattern for; change the layers or the arms"
            )
        return [*chosen, f"stack.pattern={self.patterns[layers]}"]


NO_POSITIONS = "position=none"
MAMBA2_STATE = "mixer.d_state={quarter}"
DELTANET_STATE = ("mixer.expand_k=1.0", "mixer.expand_v=1.0")
ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="attention", label="attention", overrides=("mixer=mha",)),
        Arm(name="mla", label="MLA", overrides=("mixer=mla",)),
        Arm(
            name="mamba2",
            label="Mamba-2",
            overrides=("mixer=mamba2", NO_POSITIONS),
            small=(MAMBA2_STATE,),
        ),
        Arm(
            name="gated_deltanet",
            label="gated DeltaNet",
            overrides=("mixer=gated_deltanet", NO_POSITIONS),
            small=DELTANET_STATE,
        ),
        Arm(
            name="gated_deltanet_neg",
            label="gated DeltaNet, eigenvalues in [-1, 1]",
            overrides=("mixer=gated_deltanet", "mixer.allow_neg_eigval=true", NO_POSITIONS),
            small=DELTANET_STATE,
        ),
        Arm(
            name="mlstm",
            label="mLSTM",
            overrides=("mixer=mlstm", NO_POSITIONS, "mixer.d_conv=4"),
            small=("mixer.qk_dim_factor=1.0",),
        ),
        Arm(name="slstm", label="sLSTM", overrides=("mixer=slstm", NO_POSITIONS), sequential=True),
        Arm(
            name="hybrid",
            label="hybrid Mamba-2 + attention",
            overrides=("mixer=mamba2", "stack=hybrid", "mixer@mixers.b=mha"),
            small=(MAMBA2_STATE,),
            patterns={2: "ab", 4: "aaab", 8: "aaab"},
        ),
        # Widths that equal attention's parameters are not aligned as grouped products want, and
        # the loop over experts instead of them asks the host how many rows each has.
        Arm(
            name="moe",
            label="attention + MoE",
            overrides=("mixer=mha", "channel=moe"),
            small=("channel.backend=masked",),
        ),
        # Embeddings times sqrt(D), as published: without it the first blocks' outputs outweigh
        # them, tokens become alike, and a rate that attention likes ends at the unigrams. In the
        # synthetic parts a fixed number of iterations, which a CUDA graph cannot vary, from zero:
        # without a seed, the first latent would tell positions.
        Arm(
            name="recurrent_depth",
            label="attention, recurrent depth",
            overrides=(
                "mixer=mha",
                "stack=recurrent_depth",
                "stack.repeats=4",
                "embedding.scale={root:.4f}",
            ),
            small=(
                "stack.coda=0",
                "stack.sampling=fixed",
                "stack.backprop_repeats=null",
                "stack.latent=zeros",
            ),
            large=("stack.prelude=2", "stack.coda=2"),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Matched:
    """An arm at the yardstick's size. overrides: complete, for `llmtrain train`; body: parameters
    that a token uses outside the embedding; total: all parameters; hidden: model.ffn_hidden."""

    overrides: list[str]
    config: dict
    body: int
    total: int
    hidden: int
    target: int


def body_parameters(model: LanguageModel) -> int:
    """Parameters outside embedding and head that a token uses: not the experts that it does not
    choose."""
    counts = parameters_by_part(model)
    body = counts["total"] - sum(counts[part] for part in OUTSIDE)
    return body - sum(block.channel.idle_parameters() for block in model.stack.blocks)


def effective(chosen: list[str], sizes: list[str]) -> list[str]:
    """chosen, and those sizes that it reads: a size of the model without effect is an error."""
    raw, _ = hydra_compose("train", chosen, ())
    read = READ_BY_BUILD | interpolated(OmegaConf.to_container(raw, resolve=False), "model")

    def reads(override: str) -> bool:
        section, _, key = override.partition("=")[0].partition(".")
        return section != "model" or key in read

    return [*chosen, *(override for override in sizes if reads(override))]


def build_meta(overrides: list[str], vocab_size: int) -> tuple[dict, LanguageModel]:
    config = compose("train", overrides)
    return config, build.build_model(config, vocab_size=vocab_size, device="meta")


def match(
    arm: Arm,
    sizes: list[str],
    *,
    d_model: int,
    layers: int,
    vocab_size: int,
    synthetic: bool,
    multiple: int = 1,
) -> Matched:
    """The arm with the width of the channel part that equals attention's parameters.

    sizes: overrides for every arm, of model and training. multiple: of that width. ValueError when
    no width does, because the rest of the arm alone is too large or the step too coarse.
    """
    size = {"width": d_model, "layers": layers, "synthetic": synthetic}
    common = [*sizes, f"model.d_model={d_model}", f"model.n_layers={layers}"]
    default = -(-round(8 / 3 * d_model) // multiple) * multiple

    def attempt(chosen: list[str], hidden: int) -> tuple[dict, LanguageModel, list[str]]:
        overrides = effective(chosen, [*common, f"model.ffn_hidden={hidden}"])
        return *build_meta(overrides, vocab_size), overrides

    _, yardstick, _ = attempt(ARMS["attention"].chosen(**size), default)
    target = body_parameters(yardstick)
    chosen = arm.chosen(**size)
    low, high = (body_parameters(attempt(chosen, h)[1]) for h in (multiple, default + multiple))
    # The body is a straight line over the width: every weight of the channel part has it once.
    slope = (high - low) / default
    hidden = round((target - low) / slope / multiple) * multiple + multiple if slope else 0
    if hidden < multiple:
        raise ValueError(
            f"{arm.name}: got {low:,} parameters beside the channel part at d_model={d_model}, "
            f"expected fewer than attention's {target:,} in all; raise attention's width"
        )
    config, model, overrides = attempt(chosen, hidden)
    body = body_parameters(model)
    if abs(body / target - 1) > TOLERANCE:
        raise ValueError(
            f"{arm.name}: got {body:,} parameters with model.ffn_hidden={hidden}, expected "
            f"{target:,} within {TOLERANCE:.0%}; lower the multiple ({multiple})"
        )
    total = parameters_by_part(model)["total"]
    return Matched(
        overrides=overrides, config=config, body=body, total=total, hidden=hidden, target=target
    )
