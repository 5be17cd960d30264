"""Checks of a composed configuration: keys, types, sizes, and values that would have no effect.

Every check raises ValueError with place, what was got, what was expected and how to fix it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Collection, Iterator

from hydra.core.override_parser.types import Override

from llmtrain import build, schema
from llmtrain.groups import did_you_mean, given
from llmtrain.model.language_model import LanguageModel
from llmtrain.objectives.multi_token import check_depth
from llmtrain.widen import check_base

MISSING = "???"  # a value that only `llmtrain prep` needs
# Keys of the model section that build.py reads itself; the others act through ${model.<key>}.
READ_BY_BUILD = {"d_model", "n_layers", "vocab_size", "vocab_multiple", "max_seq_len"}
READ_BY_BUILD |= {"mup_base_width", "mup_base_head_dim"}
# What `llmtrain prep` reads of the configuration that it shares with `llmtrain train`.
READ_BY_PREP = ("data", "tokenizer", "overwrite", "experiment")
# Commands of llmtrain.slurm, which checks what its own keys mean together.
SLURM = ("launch", "preflight", "status", "logs")


def validate(command: str, config: dict, raw: dict, typed: list[Override]) -> None:
    """All checks of a command's configuration.

    raw: the configuration with its interpolations, typed: the overrides of the command line.
    """
    written = {key: config[key] for key in config if key not in ("choices", "overrides")}
    check_section(written, schema.COMMANDS[command], "")
    if command in SLURM:
        check_slurm(config)
        return
    if command == "generate":
        check_generate(config, typed)
        return
    if command == "eval":
        check_eval(config, typed)
        return
    if command in ("checkpoint", "bench"):  # their own modules look at what each action reads
        return
    for place, node in parts({**config, "stack": build.stack_node(config)}):
        check_part(node, build.label(config, place))
    for key, kind in build.BLOCK_KNOBS.items():
        schema.check_type(config["stack"][key], kind, f"stack.{key}")
    check_weights(config["data"])
    if command == "prep":
        check_prep(typed)
        return
    check_sizes(config)
    check_health(config["health"], typed)
    check_profile(config["train"], typed)
    check_mounted(config)
    check_position(config)
    check_model_overrides(raw, typed)
    build.build_objective(config)
    if depth := build.multi_token_depth(config):
        check_depth(depth, config["train"]["seq_len"])
    if command == "plan":
        check_plan(config)
    vocab_size = build.configured_vocab_size(config)
    model = build.build_model(config, vocab_size=vocab_size, device="meta")
    check_causal(config, model)
    check_compile(config, model)


def check_section(section: dict, kind: type, place: str) -> None:
    """Keys and types of a plain section against a dataclass of schema.py."""
    hints = typing.get_type_hints(kind)
    for key, value in section.items():
        if key not in hints:
            raise ValueError(
                f"{place or 'configuration'}: key {key!r} is read by nothing, expected one of "
                f"{', '.join(hints)}; remove it.{did_you_mean(str(key), hints)}"
            )
        inside = f"{place}.{key}" if place else key
        if dataclasses.is_dataclass(hints[key]):
            schema.check_type(value, dict, inside)
            check_section(value, hints[key], inside)
        else:
            schema.check_type(value, hints[key], inside)
    for key in hints:
        if key not in section:
            raise ValueError(f"{place or 'configuration'}: key {key!r} is missing; add it")


def parts(node: object, place: str = "") -> Iterator[tuple[str, dict]]:
    """(place, node) of every node with a `_target_`."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield place, node
    for key, value in node.items():
        yield from parts(value, f"{place}.{key}" if place else str(key))


def check_part(node: dict, place: str) -> None:
    """Knobs of a part against its constructor's signature: names and annotated types.

    place: how the user names the part, "mixer=attention".
    """
    made_by = build.target(node, place)
    names = inspect.signature(made_by).parameters
    hints = typing.get_type_hints(made_by.__init__ if inspect.isclass(made_by) else made_by)
    for key, value in build.knobs(node).items():
        if key not in names:
            raise ValueError(
                f"{place}: {node['_target_']} has no knob {key!r}, expected some of "
                f"{', '.join(names)}; remove it.{did_you_mean(key, names)}"
            )
        if key in hints and value != MISSING:
            schema.check_type(value, hints[key], f"{place.partition('=')[0]}.{key}")


def positive(section: dict, keys: Collection[str], place: str) -> None:
    """ValueError when one of these numbers is given and not above zero. place: of the section."""
    for key in keys:
        if section[key] is not None and section[key] <= 0:
            name = f"{place}.{key}" if place else key
            raise ValueError(
                f"{name}: got {section[key]}, expected more than 0; set {name} to such a number"
            )


def check_sizes(config: dict) -> None:
    """Sizes are positive, and those that must divide do."""
    train, model = config["train"], config["model"]
    numbers = [key for key, value in train.items() if type(value) in (int, float)]
    positive(train, numbers, "train")
    positive(model, [key for key, value in model.items() if type(value) in (int, float)], "model")
    check_base(model)
    seq_len, batch = train["seq_len"], train["global_batch_tokens"]
    if seq_len > model["max_seq_len"]:
        raise ValueError(
            f"train.seq_len: got {seq_len}, expected at most "
            f"model.max_seq_len={model['max_seq_len']}; change either"
        )
    if batch % seq_len:
        nearest = max(1, round(batch / seq_len)) * seq_len
        raise ValueError(
            f"train.global_batch_tokens: got {batch}, expected a multiple of "
            f"train.seq_len={seq_len}; set train.global_batch_tokens={nearest}"
        )
    micro = train["micro_batch"]
    if micro is not None and (batch // seq_len) % micro:
        raise ValueError(
            f"train.micro_batch: got {micro}, expected a divisor of the {batch // seq_len} rows "
            "of a global batch (train.global_batch_tokens / train.seq_len); change either, or "
            "set train.micro_batch=null"
        )


def check_health(health: dict, typed: list[Override]) -> None:
    """Numbers are positive, a factor is above one, and none is given for a check that is off."""
    numbers = [key for key, value in health.items() if type(value) in (int, float)]
    positive(health, numbers, "health")
    factor = health["straggler_factor"]
    if factor is not None and factor <= 1:
        raise ValueError(
            f"health.straggler_factor: got {factor}, expected more than 1 (1.3: steps take 30 % "
            "longer), or null; set health.straggler_factor=1.3"
        )
    override = given(typed, "health.optimizer_check_elements")
    if override and not health["optimizer_check"]:
        raise ValueError(
            f"{override.input_line}: has no effect with health.optimizer_check=false; remove either"
        )


def check_profile(train: dict, typed: list[Override]) -> None:
    """The steps to profile lie in the run, and are not given for a profile that is off."""
    steps = -(-train["total_tokens"] // train["global_batch_tokens"])
    last = train["profile_first"] + train["profile_steps"] - 1
    if train["profile"] and last > steps:
        raise ValueError(
            f"train.profile_first: got {train['profile_first']} and {train['profile_steps']} steps "
            f"to profile, expected them within the {steps} steps of the run; lower "
            "train.profile_first or raise train.total_tokens"
        )
    for key in ("profile_first", "profile_steps"):
        override = given(typed, f"train.{key}")
        if override and not train["profile"]:
            raise ValueError(
                f"{override.input_line}: has no effect with train.profile=false; add "
                "train.profile=true or remove it"
            )


def check_mounted(config: dict) -> None:
    """Every mounted mixer and channel stands in its pattern."""
    for group, pattern in build.PATTERNS.items():
        letters = set(build.layer_letters(config, group))
        for letter, (_, name) in build.mounted(config, group).items():
            if letter not in letters:
                raise ValueError(
                    f"{name}: has no effect, letter {letter!r} does not stand in stack.{pattern}="
                    f"{config['stack'][pattern]}; add the letter or remove the {group}"
                )


def check_position(config: dict) -> None:
    """Rotary positions act only through mixers that read them."""
    name = build.label(config, "position")
    if not build.target(config["position"], name).rotary_kind:
        return
    mixers = list(build.mounted(config, "mixer").values())
    if not any(build.target(*mixer).uses_positions for mixer in mixers):
        raise ValueError(
            f"{name}: has no effect, none of {', '.join(label for _, label in mixers)} reads "
            "rotary angles; set position=none (or sinusoidal, learned), or choose another mixer"
        )


def check_causal(config: dict, model: LanguageModel) -> None:
    """No mixer sees the tokens that an objective wants predicted."""
    objective = build.label(config, "objective")
    if not build.target(config["objective"], objective).predicts_later_tokens:
        return
    mixers = build.mounted(config)
    for letter, block in zip(build.layer_letters(config), model.stack.layers, strict=True):
        if not block.mixer.causal:
            raise ValueError(
                f"{mixers[letter][1]}: a token sees those after it, which {objective} wants "
                "predicted, expected a causal mixer; choose another mixer or objective"
            )


def check_compile(config: dict, model: LanguageModel) -> None:
    """One graph of the whole model needs one depth."""
    if config["train"]["compile"] == "model" and model.stack.draws_depth:
        raise ValueError(
            f"train.compile: got model with stack.sampling={config['stack']['sampling']}, which "
            "would be compiled anew for every number of iterations, expected blocks or none; set "
            "train.compile=blocks, or stack.sampling=fixed"
        )


def interpolated(raw: object, section: str) -> set[str]:
    """The keys of a section that some ${section.key} of the configuration reads."""
    if isinstance(raw, dict):
        return set().union(*(interpolated(value, section) for value in raw.values()))
    if isinstance(raw, list):
        return set().union(*(interpolated(value, section) for value in raw))
    return set(re.findall(rf"\$\{{{section}\.(\w+)\}}", raw)) if isinstance(raw, str) else set()


def check_model_overrides(raw: dict, typed: list[Override]) -> None:
    """A model size given on the command line is read by some chosen part."""
    read = READ_BY_BUILD | interpolated(raw, "model")
    for override in typed:
        section, _, key = override.key_or_group.partition(".")
        if section == "model" and key and key not in read:
            raise ValueError(
                f"{override.input_line}: has no effect, none of the chosen parts reads "
                f"model.{key}, expected one of {', '.join(sorted(read))}; remove it"
            )


def check_weights(data: dict) -> None:
    """Weights of sources: one for each, and only where there are several."""
    sources, weights = data["sources"], data["weights"]
    if weights is None:
        return
    if len(sources) == 1:
        raise ValueError(
            f"data.weights: has no effect with the single source {next(iter(sources))!r}; "
            "set data.weights=null, or add sources"
        )
    if set(weights) != set(sources):
        raise ValueError(
            f"data.weights: got weights of {', '.join(sorted(weights))}, expected one for each "
            f"of data.sources: {', '.join(sorted(sources))}; add or remove weights"
        )
    positive(weights, weights, "data.weights")


def check_slurm(config: dict) -> None:
    """Limits of the node check, and what of the logs is shown, are positive."""
    positive(config, [key for key in ("step", "tail", "array_limit") if key in config], "")
    limits = config.get("preflight", {})
    positive(limits, [key for key in limits if key != "enabled"], "preflight")


def check_prep(typed: list[Override]) -> None:
    """Nothing is typed that prep does not read."""
    for override in typed:
        section = override.key_or_group.partition(".")[0]
        if section not in READ_BY_PREP:
            raise ValueError(
                f"{override.input_line}: has no effect on `llmtrain prep`, which reads "
                f"{', '.join(READ_BY_PREP)}; remove it"
            )


def check_plan(config: dict) -> None:
    plan = config["plan"]
    positive(plan, ("ranks", "tokens_per_second", "mfu"), "plan")
    if plan["tokens_per_second"] is not None and plan["device_name"] is not None:
        raise ValueError(
            f"plan.device_name: {plan['device_name']!r} has no effect, the rate is given by "
            f"plan.tokens_per_second={plan['tokens_per_second']}; remove either"
        )


def check_eval(config: dict, typed: list[Override]) -> None:
    """Numbers are positive, and nothing is typed that only tasks that are not asked for read."""
    positive(config, ("limit", "max_length", "batch_tokens", "repeats"), "")
    positive(config["bits_per_byte"], ("stride", "max_tokens"), "bits_per_byte")
    positive(config["next_line"], ("items", "context_lines"), "next_line")
    positive(config["passkey"], ("samples",), "passkey")
    tasks = config["tasks"]
    if not tasks:
        raise ValueError("tasks: got an empty list, expected names; set tasks=[bits_per_byte]")
    probes = {"bits_per_byte", "ngram"}
    harness = set(tasks) - probes - {"passkey"}
    readers = {
        "bits_per_byte": (probes, probes & set(tasks)),
        "next_line": ({"next_line"}, {"next_line"} & set(tasks)),
        "passkey": ({"passkey"}, [task for task in tasks if task.startswith("passkey")]),
    }
    for key in ("limit", "num_fewshot", "max_length", "log_samples", "include_path"):
        readers[key] = ({"a task of lm-eval"}, harness)
    for key, (wanted, present) in readers.items():
        override = given(typed, key)
        if override and not present:
            raise ValueError(
                f"{override.input_line}: has no effect, {' or '.join(sorted(wanted))} is not among "
                f"tasks=[{','.join(tasks)}]; add it, or remove this"
            )


def check_generate(config: dict, typed: list[Override]) -> None:
    numbers = ("max_new_tokens", "samples", "top_k", "top_p", "speculate")
    positive(config, (*numbers, "repeats", "exit_threshold"), "")
    if config["speculate"] is not None and config["exit_threshold"] is not None:
        raise ValueError(
            f"exit_threshold: got {config['exit_threshold']} with speculate={config['speculate']}, "
            "which checks several tokens at once and ends none of them early, expected one of the "
            "two; remove either"
        )
    if config["temperature"] < 0:
        raise ValueError(
            f"temperature: got {config['temperature']}, expected 0 (greedy) or more; "
            "set temperature=0.8"
        )
    if config["temperature"] > 0:
        return
    for key in ("top_k", "top_p", "samples", "seed"):
        if override := given(typed, key):
            raise ValueError(
                f"{override.input_line}: has no effect with temperature=0, which always takes "
                "the most likely token; remove it, or set temperature=0.8"
            )
