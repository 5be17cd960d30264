"""From a resolved configuration to objects: the only place that instantiates a `_target_`.

A part's constructor takes d_model first where it has a width, then keyword arguments: the facts
only known here (layer_idx, n_layers, rotary_widths, ...) and the knobs of its YAML file. What each
group's target is called with is written in build_model, below.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from llmtrain_data.tokenizer import load_tokenizer, vocab_span

from llmtrain.mixers.base import Mixer
from llmtrain.model.block import Block
from llmtrain.model.init import initialise
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.multi_token import MultiTokenModule
from llmtrain.model.shared_attention import SharedBlock
from llmtrain.model.stack import Stack
from llmtrain.model.width import compare
from llmtrain.widen import twice_as_wide

# A configuration may come with a downloaded checkpoint, so `_target_` can only name our own parts.
ALLOWED = ("llmtrain.", "llmtrain_data.")
# train.precision -> dtype of the activations.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "fp8_rowwise": torch.bfloat16,
}
# train.precision -> how its float8 products are scaled (train/copies.py).
SCALINGS = {"fp8": "tensorwise", "fp8_rowwise": "rowwise"}
# Knobs of the stack that say how blocks are made, with their types; its others go to the stack.
BLOCK_KNOBS = {
    "pattern": str | list[str],
    "channel_pattern": str | list[str],
    "shared": str | None,
    "norm_position": str,
}
# Groups mounted at letters, and the knob of the stack with their letters.
PATTERNS = {"mixer": "pattern", "channel": "channel_pattern"}


def target(node: dict, where: str) -> Callable[..., Any]:
    """The class or function that a node's `_target_` names. ValueError when it may not or cannot.

    where: how the user names the node, "mixer=attention".
    """
    name = node.get("_target_")
    if not isinstance(name, str) or not name.startswith(ALLOWED):
        raise ValueError(
            f"{where}: _target_ is {name!r}, expected a name that starts with "
            f"{' or '.join(ALLOWED)}; parts of other packages are not instantiated"
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module_name.startswith(str(error.name)):
            raise  # the part exists; what it imports is not installed
        raise ValueError(
            f"{where}: _target_ {name!r} does not exist ({error}); "
            "fix the _target_ line of its YAML file"
        ) from error


def knobs(node: dict) -> dict:
    """The knobs of a node: its keys without hydra's own."""
    return {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}


def part(node: dict, where: str, *args: Any, **runtime: Any) -> Any:
    """Build one part: node's target called with args, runtime facts and the node's knobs.

    where: how the user names the node, "mixer=attention"; every ValueError starts with it.
    """
    build = target(node, where)
    signature = inspect.signature(build)
    try:
        signature.bind(*args, **{**runtime, **knobs(node)})
    except TypeError as error:
        valid = sorted(set(signature.parameters) - set(runtime))
        raise ValueError(
            f"{where}: {node['_target_']} {error}; its knobs are {', '.join(valid)}"
        ) from error
    partial = instantiate(
        {**node, "_partial_": True}, _recursive_=False, _convert_="all", **runtime
    )
    try:
        return partial(*args)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error


def label(config: dict, group: str) -> str:
    """How the user names the chosen option of a group: "mixer=attention"."""
    option = config.get("choices", {}).get(group)
    return group if option is None else f"{group}={option}"


def mounted(config: dict, group: str = "mixer") -> dict[str, tuple[dict, str]]:
    """Pattern letter -> (node, label) of the mixers or channels. `mixer`, `channel`: letter a."""
    nodes = {"a": (config[group], label(config, group))}
    for letter, node in config.get(f"{group}s", {}).items():
        nodes[letter] = (node, label(config, f"{group}@{group}s.{letter}"))
    return nodes


def layer_letters(config: dict, group: str = "mixer") -> list[str]:
    """The pattern letter of every layer. ValueError when it does not fit the layers or parts."""
    key = PATTERNS[group]
    pattern, n_layers = config["stack"][key], config["model"]["n_layers"]
    if isinstance(pattern, str):
        if not pattern or n_layers % len(pattern):
            raise ValueError(
                f"stack.{key}: got {pattern!r} ({len(pattern)} letters) for "
                f"model.n_layers={n_layers}, expected a length that divides it; "
                "change either, or give a list with one letter a layer"
            )
        letters = list(pattern) * (n_layers // len(pattern))
    else:
        letters = list(pattern)
        if len(letters) != n_layers:
            raise ValueError(
                f"stack.{key}: got a list of {len(letters)} letters, expected "
                f"model.n_layers={n_layers}; change either, or give a string to be repeated"
            )
    names = mounted(config, group)
    for letter in letters:
        if letter not in names:
            raise ValueError(
                f"stack.{key}: letter {letter!r} names no {group}, expected one of "
                f"{', '.join(sorted(names))}; mount it with +{group}@{group}s.{letter}=<option>"
            )
    return letters


def stack_node(config: dict) -> dict:
    """The stack's node without the knobs that are used here."""
    return {key: value for key, value in config["stack"].items() if key not in BLOCK_KNOBS}


def padded_vocab_size(config: dict, vocab_size: int) -> int:
    """Rows of the embedding: enough for the tokenizer and model.vocab_size, rounded up."""
    wanted = config["model"]["vocab_size"] or vocab_size
    if wanted < vocab_size:
        raise ValueError(
            f"model.vocab_size: got {wanted}, expected at least the tokenizer's {vocab_size}; "
            "set model.vocab_size=null to follow the tokenizer"
        )
    multiple = config["model"]["vocab_multiple"]
    return math.ceil(wanted / multiple) * multiple


def configured_vocab_size(config: dict) -> int:
    """Tokens of the vocabulary as far as the configuration tells, for plans and checks; what counts
    in a run is the corpus. An existing tokenizer's file is read if nothing else tells."""
    node = config["tokenizer"]
    known = node.get("vocab_size") or config["model"]["vocab_size"]
    return known or vocab_span(load_tokenizer(node["path"]))


def build_model(
    config: dict,
    *,
    vocab_size: int,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """The model of a configuration, initialised from config["seed"] (not on meta).

    vocab_size: number of tokens of the tokenizer. Weights are drawn on the CPU, so that they do
    not depend on the device.
    """
    on_meta = torch.device(device).type == "meta"
    model = allocate(config, vocab_size, "meta" if on_meta else "cpu", compute_dtype)
    if config["model"].get("mup_base_width") is not None:
        transfer(model, config, vocab_size)
    if on_meta:
        return model
    initialise(model, config["seed"])
    if model.width is not None:
        model.width.scale_first_values(model)
    return model.to(device)


def transfer(model: LanguageModel, config: dict, vocab_size: int) -> None:
    """Make it a model whose best learning rate is that of its base width (model/width.py)."""
    sizes = config["model"]
    wider = allocate(twice_as_wide(config), vocab_size, "meta", torch.float32)
    multiplier = sizes["d_model"] / sizes["mup_base_width"]
    model.width = compare(model, wider, multiplier)
    model.logit_scale = 1 / multiplier
    if multiplier == 1:
        return
    for module, wide in zip(model.modules(), wider.modules(), strict=True):
        if isinstance(module, Mixer) and module.score_width != wide.score_width:
            module.transfer_scores(multiplier)


def allocate(
    config: dict, vocab_size: int, device: str, compute_dtype: torch.dtype
) -> LanguageModel:
    """The model without values in its parameters."""
    sizes = config["model"]
    d_model, n_layers = sizes["d_model"], sizes["n_layers"]
    rows = padded_vocab_size(config, vocab_size)
    norm = norm_maker(config)
    with torch.device(device):
        layers = build_layers(config)
        letters = layer_letters(config)[-1], layer_letters(config, "channel")[-1]
        mtp = [
            MultiTokenModule(
                d_model,
                block=build_block(config, n_layers + i, *letters),
                norms=(norm(), norm(), norm()),
                init_std=sizes["init_std"],
            )
            for i in range(multi_token_depth(config))
        ]
        return LanguageModel(
            embedding=part(
                config["embedding"], label(config, "embedding"), d_model, vocab_size=rows
            ),
            position=part(
                config["position"],
                label(config, "position"),
                d_model,
                max_seq_len=sizes["max_seq_len"],
                rotary_widths=rotary_widths(layers),
            ),
            stack=build_stack(config, layers),
            norm=norm(),
            vocab_size=vocab_size,
            padded_vocab_size=rows,
            compute_dtype=compute_dtype,
            mtp=mtp,
        )


def norm_maker(config: dict, width: int | None = None) -> Callable[[], torch.nn.Module]:
    """What makes a norm over model.d_model, or over another width."""
    width = config["model"]["d_model"] if width is None else width
    return lambda: part(config["norm"], label(config, "norm"), width)


def build_layers(config: dict) -> list[Block | SharedBlock]:
    """The block of every layer: one of its own, or one for all layers of a shared letter."""
    shared = shared_letters(config)
    made: dict[str, Block | SharedBlock] = {}
    layers = []
    pairs = zip(layer_letters(config), layer_letters(config, "channel"))
    for i, (mixer, channel) in enumerate(pairs):
        block = made.get(mixer)
        if block is None:
            block = build_block(config, i, mixer, channel)
        if mixer in shared:
            made[mixer] = block
        layers.append(block)
    return layers


def build_block(config: dict, layer_idx: int, mixer: str, channel: str) -> Block | SharedBlock:
    """The block of a layer with these letters."""
    d_model, n_layers = config["model"]["d_model"], config["model"]["n_layers"]
    stack = config["stack"]
    # A repeated core adds to the residual stream once per application, and the first weights of
    # output projections are scaled by the number of those additions.
    core = n_layers - stack.get("prelude", 0) - stack.get("coda", 0)
    facts = {
        "layer_idx": layer_idx,
        "n_layers": n_layers + (stack.get("repeats", 1) - 1) * core,
    }
    (mixer_node, mixer_name), (channel_node, channel_name) = (
        mounted(config)[mixer],
        mounted(config, "channel")[channel],
    )
    channel_part = part(channel_node, channel_name, d_model, **facts)
    branch = target(stack, label(config, "stack")).shares_a_branch
    if not branch or mixer not in shared_letters(config):
        return Block(
            part(mixer_node, mixer_name, d_model, **facts),
            channel_part,
            norm_maker(config),
            norm_position=stack["norm_position"],
        )
    if mixer_node.get("d_input", 0) is not None:
        raise ValueError(
            f"{mixer_name}: mounted at the letter that {label(config, 'stack')} shares, where it "
            f"reads 2 * model.d_model = {2 * d_model} channels, expected a mixer with the knob "
            "d_input left at null, such as attention; choose another option or letter"
        )
    return SharedBlock(
        part({**mixer_node, "d_input": 2 * d_model}, mixer_name, d_model, **facts),
        channel_part,
        norm_maker(config, 2 * d_model)(),
        norm_maker(config),
    )


def shared_letters(config: dict) -> set[str]:
    """The mixer letters whose layers share a block. ValueError when that makes no sense."""
    shared = config["stack"]["shared"] or ""
    mixers, channels = layer_letters(config), layer_letters(config, "channel")
    least = 1 if target(config["stack"], label(config, "stack")).shares_a_branch else 2
    for letter in shared:
        found = {channel for mixer, channel in zip(mixers, channels) if mixer == letter}
        if mixers.count(letter) < least:
            raise ValueError(
                f"stack.shared: letter {letter!r} stands {mixers.count(letter)} times in "
                f"stack.pattern={config['stack']['pattern']} over model.n_layers={len(mixers)}, "
                f"expected at least {least} layers to share the block; change either"
            )
        if len(found) > 1:
            raise ValueError(
                f"stack.shared: the layers of letter {letter!r} have the channels "
                f"{', '.join(sorted(found))}, expected one for the block that they share; "
                "change stack.channel_pattern"
            )
    return set(shared)


def build_stack(config: dict, layers: list[Block | SharedBlock]) -> Stack:
    """The stack of these layers; it gets those facts that its constructor asks for."""
    node, name = stack_node(config), label(config, "stack")
    facts = {"d_model": config["model"]["d_model"], "norm": norm_maker(config)}
    asked = inspect.signature(target(node, name)).parameters
    given = {key: value for key, value in facts.items() if key in asked}
    return part(node, name, layers, **given)


def multi_token_depth(config: dict) -> int:
    """How many modules of multi-token prediction the objective trains; they are like the last
    layer."""
    return config["objective"].get("depth", 0)


def rotary_widths(blocks: list[Block | SharedBlock]) -> tuple[int, ...]:
    """The head widths that rotary angles are made for: those of the mixers that use them."""
    modules = [module for block in blocks for module in block.modules()]
    mixers = [module for module in modules if isinstance(module, Mixer)]
    return tuple(sorted({mixer.rotary_width for mixer in mixers if mixer.uses_positions}))


def build_objective(config: dict) -> torch.nn.Module:
    return part(config["objective"], label(config, "objective"))


def build_sources(config: dict, key: str = "sources") -> dict[str, Any]:
    """Source name -> source, of config["data"]["sources"] or ["val_sources"]."""
    nodes = config["data"].get(key) or {}
    return {name: part(node, f"data.{key}.{name}") for name, node in nodes.items()}
