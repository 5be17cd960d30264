"""Compose a command's configuration once: YAML groups + overrides -> one plain, resolved dict.

The dict has the keys of configs/<command>.yaml and two more: `choices` (group -> chosen option)
and `overrides` (what the user typed). It is saved in the run folder and read by everything else;
nothing composes a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from llmtrain import build, groups
from llmtrain.validate import validate

# Values without a default that a prepared corpus makes unnecessary.
ONLY_PREP_READS = ("data.sources.", "data.val_sources.")


def compose(
    command: str, overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()
) -> dict:
    """The resolved and checked configuration of a command: plain dicts, lists and scalars.

    overrides: hydra overrides ("mixer=mha", "train.seq_len=512", "+mixer@mixers.b=mha").
    config_dirs: folders searched for group options besides the shipped ones.
    Raises ValueError for whatever is wrong with it.
    """
    found, typed = groups.options(config_dirs), groups.parse(overrides)
    by_group = [override for override in typed if groups.is_group(override, found)]
    values = [override for override in typed if override not in by_group]
    takes_groups = bool(groups.defaults(command))
    chosen = groups.chosen_options(command, by_group, config_dirs) if takes_groups else {}
    for override in by_group:
        groups.check_group(override, found, chosen, command)
    try:
        raw, choices = hydra_compose(command, overrides, config_dirs)
        if groups.given(typed, "position") is None and has_idle_position(raw, choices):
            raw, choices = hydra_compose(command, [*overrides, "position=none"], config_dirs)
    except ValueError:
        check_keys(command, by_group, values, config_dirs)  # says it better, if that is it
        raise
    if any(override.type != OverrideType.CHANGE for override in values):
        check_keys(command, by_group, values, config_dirs)
    try:
        resolved = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{error.full_key}: {str(error).splitlines()[0]}, expected a key of the "
            "configuration in ${...}; fix it in the YAML file or override"
        ) from error
    for missing in sorted(OmegaConf.missing_keys(raw)):
        if command != "prep" and missing.startswith(ONLY_PREP_READS):
            continue
        raise ValueError(
            f"{missing}: no value, expected one on the command line; add {missing}=... "
            f"(see `llmtrain {command} --help`)"
        )
    config = {**resolved, "choices": choices, "overrides": list(overrides)}
    validate(command, config, OmegaConf.to_container(raw, resolve=False), typed)
    return config


def reload(command: str, file: str | Path) -> dict:
    """A resolved configuration of a command, as save() wrote it, checked again."""
    config = load(file)
    if not isinstance(config, dict) or not {"choices", "overrides"} <= config.keys():
        raise ValueError(
            f"--config: {file} is no resolved configuration, expected the config.yaml of a run or "
            f"of a submission of `llmtrain launch`; overrides go without --config"
        )
    validate(command, config, raw=config, typed=[])
    return config


def has_idle_position(raw: DictConfig, choices: dict[str, str]) -> bool:
    """Whether the position is rotary though no mixer reads angles: a default that nobody typed then
    gives way to position=none."""
    if not {"position", "mixer"} <= choices.keys():
        return False
    config = {
        **OmegaConf.to_container(OmegaConf.masked_copy(raw, ["position", "mixer", "mixers"])),
        "choices": choices,
    }
    if not build.target(config["position"], build.label(config, "position")).rotary_kind:
        return False
    return not any(build.target(*part).uses_positions for part in build.mounted(config).values())


def check_keys(
    command: str,
    by_group: list[Override],
    values: list[Override],
    config_dirs: Sequence[str | Path],
) -> None:
    """Check the keys that were typed against the configuration that the chosen groups make."""
    raw, _ = hydra_compose(command, [override.input_line for override in by_group], config_dirs)
    plain = OmegaConf.to_container(raw, resolve=False)
    names = groups.options(config_dirs) if groups.defaults(command) else {}
    for override in values:
        groups.check_key(override, plain, names)


def hydra_compose(
    command: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]
) -> tuple[DictConfig, dict[str, str]]:
    """The composed configuration with its interpolations, and group -> option."""
    search = ",".join(f"file://{Path(folder).resolve()}" for folder in config_dirs)
    extra = [f"hydra.searchpath=[{search}]"] if search else []
    try:
        with hydra.initialize_config_dir(str(groups.config_root()), version_base="1.3"):
            config = hydra.compose(command, [*overrides, *extra], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise ValueError(f"llmtrain {command}: {'; '.join(filter(None, lines))}") from error
    choices = {
        group: option
        for group, option in config.hydra.runtime.choices.items()
        if not group.startswith("hydra/")
    }
    with open_dict(config):
        del config["hydra"]
    return config, choices


def save(config: dict, run_dir: str | Path) -> Path:
    """Write run_dir/config.yaml, atomically; returns its path."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    temporary.replace(path)
    return path


def load(path: str | Path) -> dict:
    """Read a saved configuration: a config.yaml, or a folder that holds one."""
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def leaves(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything that is not a non-empty dict."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def diff(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Dotted key -> (old value, new value) of everything that differs; None where absent."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
