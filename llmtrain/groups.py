"""The config groups and their options, read from the YAML folders, and the checks of overrides.

Everything a user can mistype on the command line gets its message here: groups, options, keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

# Dicts whose keys the user chooses.
OPEN = ("data.sources", "data.val_sources", "data.weights")
# Groups of which further options can be mounted at pattern letters, and where.
MOUNTS = {"mixer": "mixers", "channel": "channels"}


def config_root() -> Path:
    """The folder of the shipped YAML files: inside an installed package, or the checkout's."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def options(config_dirs: Sequence[str | Path] = ()) -> dict[str, list[str]]:
    """Group -> its options, sorted: the files of the shipped and the given folders."""
    shipped = sorted(folder for folder in config_root().iterdir() if folder.is_dir())
    found = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in shipped}
    for root in map(Path, config_dirs):
        if not root.is_dir():
            raise ValueError(
                f"--config-dir: {root} is not a folder, expected one that holds group folders "
                "such as mixer/; check the path"
            )
        for group, names in found.items():
            names.update(file.stem for file in (root / group).glob("*.yaml"))
    return {group: sorted(names) for group, names in found.items() if names}


def primaries(command: str) -> list[Path]:
    """The YAML files a command is made of: its own, and those it builds on."""
    file = config_root() / f"{command}.yaml"
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    below = [name for name in defaults if isinstance(name, str) and name != "_self_"]
    return [*(path for name in below for path in primaries(name)), file]


def defaults(command: str) -> dict[str, str]:
    """Group -> the option that a command takes when none is given."""
    chosen: dict[str, str] = {}
    for file in primaries(command):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", []):
            chosen.update(entry if isinstance(entry, dict) else {})
    return chosen


def chosen_options(
    command: str, typed: list[Override], config_dirs: Sequence[str | Path] = ()
) -> dict[str, str]:
    """Group, or group@package, -> option: what the defaults, the options' own lists of defaults
    (a stack or an experiment may mount parts) and then the command line choose."""
    given_options = {
        override.key_or_group: override.value()
        for override in typed
        if override.package is None and not override.is_add()
    }
    chosen = {**defaults(command), **given_options}
    experiment = option_defaults("experiment", chosen.get("experiment"), config_dirs)
    overridden = {key: name for key, name in experiment.items() if "@" not in key}
    chosen = {**chosen, **overridden, **given_options}
    mounted = {
        key: name
        for group, option in chosen.items()
        for key, name in option_defaults(group, option, config_dirs).items()
        if "@" in key
    }
    return {**mounted, **chosen}


def option_defaults(
    group: str, option: object, config_dirs: Sequence[str | Path] = ()
) -> dict[str, str]:
    """What the list of defaults in an option's file chooses: group or group@package -> option."""
    files = [Path(root) / group / f"{option}.yaml" for root in (*config_dirs, config_root())]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    return {
        re.sub(r"^(override )?/?", "", key).replace("@_global_.", "@"): name
        for entry in entries
        for key, name in entry.items()
    }


def keys_text(command: str) -> list[str]:
    """The lines of a command's YAML files below their lists of defaults, comments included."""
    lines: list[str] = []
    for file in primaries(command):
        text = file.read_text(encoding="utf-8")
        lines += re.sub(r"(?m)^defaults:\n(  .*\n)+", "", text).rstrip().splitlines()
    return lines


def did_you_mean(word: str, valid: Sequence[str]) -> str:
    """ " Did you mean 'x'?" or nothing."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as hydra reads them. ValueError when one is no override or a sweep."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except OverrideParseException as error:
            raise ValueError(
                f"override {text!r}: cannot be read, expected key=value or group=option; quote a "
                "value that holds any of =,#(){}[]:, as in 'key=\"a=b\"'"
            ) from error
        if override.is_sweep_override():
            raise ValueError(
                f"override {text!r}: got several values, expected one; write a list as "
                "key=[a,b], quote a text with commas as 'key=\"a, b\"'"
            )
        parsed.append(override)
    return parsed


def is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    return override.package is not None or override.key_or_group in groups


def check_group(
    override: Override, groups: dict[str, list[str]], chosen: dict[str, str], command: str
) -> None:
    """ValueError when a group override names no group or option, or mounts it nowhere.

    chosen: group (or group@package) -> option, as chosen_options() gives it.
    """
    text, group, package = override.input_line, override.key_or_group, override.package
    if group not in groups:
        raise ValueError(
            f"{text}: there is no group {group!r}, expected one of "
            f"{', '.join(groups)}.{did_you_mean(group, groups)}"
        )
    if not chosen:
        raise ValueError(
            f"{text}: `llmtrain {command}` takes no groups: the parts come from the checkpoint; "
            "remove it"
        )
    if override.is_delete():
        raise ValueError(f"{text}: a group cannot be removed; choose another of its options")
    option = override.value()
    if not isinstance(option, str) or option not in groups[group]:
        raise ValueError(
            f"{group}={option}: no such option, expected one of {', '.join(groups[group])}."
            f"{did_you_mean(str(option), groups[group])}"
        )
    if package is None:
        if override.is_add():
            raise ValueError(
                f"{text}: {group} is already chosen ({group}={chosen[group]}); write "
                f"{group}={option} without +"
            )
    elif group not in MOUNTS or not re.fullmatch(rf"{MOUNTS[group]}\.[b-z]", package):
        raise ValueError(
            f"{text}: got package {package!r}, expected a further mixer or channel mounted at a "
            "letter b-z: +mixer@mixers.b=<option> with the letter in stack.pattern, or "
            "+channel@channels.b=<option> with the letter in stack.channel_pattern"
        )
    elif f"{group}@{package}" not in chosen and not override.is_add():
        raise ValueError(f"{text}: {package} is not mounted yet; write +{text} with a leading +")
    elif f"{group}@{package}" in chosen and override.is_add():
        mounted = chosen[f"{group}@{package}"]
        raise ValueError(
            f"{text}: {package} is already mounted ({group}@{package}={mounted}); write "
            f"{text.lstrip('+')} without +"
        )


def check_key(override: Override, config: dict, groups: Collection[str]) -> None:
    """ValueError when an override sets a key that the composed configuration does not have.

    groups: those that the command takes.
    """
    text, path = override.input_line, override.key_or_group.split(".")
    node: object = config
    for depth, key in enumerate(path):
        parent = ".".join(path[:depth])
        if parent in OPEN:
            return
        if not isinstance(node, dict):
            raise ValueError(f"{text}: {parent} is a value ({node!r}), it has no keys of its own")
        if key not in node:
            siblings = [name for name in node if not name.startswith("_")]
            if depth == 0:
                siblings = sorted({*siblings, *groups})
            place = f"{parent} has" if parent else "the configuration has"
            raise ValueError(
                f"{text}: {place} no key {key!r}, expected one of {', '.join(siblings)}."
                f"{did_you_mean(key, siblings)}"
            )
        node = node[key]
    if override.is_delete():
        raise ValueError(f"{text}: a knob cannot be removed; set it to the value that you want")
    if override.is_add():
        raise ValueError(f"{text}: the key exists; write {text.lstrip('+')} without +")


def given(typed: list[Override], key: str) -> Override | None:
    """The command line's override of a key, or of a key inside it."""
    for override in typed:
        if f"{override.key_or_group}.".startswith(f"{key}."):
            return override
    return None
