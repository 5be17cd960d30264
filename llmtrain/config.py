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
from omegaconf import DictConfig, OmegaConf, open_dict

COMMANDS = ("prep", "train", "eval", "generate", "plan")


def config_root() -> Path:
    """The folder of the shipped YAML files: inside an installed package, or the checkout's."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose(
    command: str, overrides: Sequence[str] = (), *, config_dirs: Sequence[str] = ()
) -> dict:
    """The resolved configuration of a command: plain dicts, lists and scalars.

    overrides: hydra overrides ("mixer=mha", "train.seq_len=512", "+mixer@mixers.b=mha").
    config_dirs: folders searched for group options besides the shipped ones.
    """
    config, choices = compose_raw(command, overrides, config_dirs)
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {**resolved, "choices": choices, "overrides": list(overrides)}


def compose_raw(
    command: str, overrides: Sequence[str], config_dirs: Sequence[str]
) -> tuple[DictConfig, dict[str, str]]:
    """The composed configuration with its interpolations, and group -> option."""
    search = [f"file://{Path(folder).resolve()}" for folder in config_dirs]
    extra = [f"hydra.searchpath=[{','.join(search)}]"] if search else []
    with hydra.initialize_config_dir(str(config_root()), version_base="1.3"):
        config = hydra.compose(command, [*overrides, *extra], return_hydra_config=True)
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
