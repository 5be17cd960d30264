"""A sweep: sweep.<key>=[a,b] for one or more keys makes a training of every combination."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override

# Keys that a sweep sets itself, or that make no different training.
REFUSED = ("name", "run_dir", "dry_run")
PREFIX = "sweep."


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training of a sweep: the name of its folder, and what it overrides."""

    name: str
    overrides: tuple[str, ...]


def points(typed: Sequence[Override]) -> list[Point]:
    """All combinations, the last key fastest. typed: the overrides that begin with PREFIX."""
    axes = []
    for override in typed:
        key, values = override.key_or_group.removeprefix(PREFIX), override.value()
        if key in REFUSED:
            raise ValueError(
                f"{override.input_line}: got a key that is the same for all runs of a sweep, which "
                "names their folders itself; remove it, or give it without sweep."
            )
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"{override.input_line}: got {values!r}, expected a list of values; write "
                f"{PREFIX}{key}=[a,b]"
            )
        axes.append([(key, text(value)) for value in values])
    found = []
    for combination in itertools.product(*axes):
        name = "_".join(f"{plain(key)}-{plain(value)}" for key, value in combination)
        overrides = tuple(f"{key}={value}" for key, value in combination)
        found.append(Point(name=name, overrides=overrides))
    names = [point.name for point in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"sweep: {names.count(name)} points would share the folder {name}, expected "
                "different values (in their letters and digits); remove one"
            )
    return found


def text(value: object) -> str:
    """A value as an override writes it; texts that are no plain words are quoted."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][\w.-]*", value) else json.dumps(value)
    if isinstance(value, dict | list | bool) or value is None:
        return json.dumps(value)
    return repr(value)


def plain(word: str) -> str:
    """What a folder's name can hold without quotes."""
    return re.sub(r"[^\w.+-]+", "-", word).strip("-") or "empty"
