"""Tables of backends by device and class of shapes: choices/<device>.toml.

What stands there was measured on that device; a device without a file takes default.toml. A tuner
may rewrite a file: write() keeps the comment lines that it is given.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "choices"
DEFAULT = "default"
SITUATIONS = ("dense", "packed", "softcap", "window")
BOUNDS = ("tokens_up_to", "k_width_up_to")

Entry = Mapping[str, object]


@functools.cache
def device_name(ordinal: int | None) -> str:
    """The stem of a CUDA device's file: h100 for an "NVIDIA H100 80GB HBM3"."""
    words = torch.cuda.get_device_name(ordinal).lower().replace("-", " ").split()
    return next((word for word in words if (FOLDER / f"{word}.toml").exists()), DEFAULT)


def order(name: str, situation: str, *, tokens: int | None, k_width: int) -> tuple[str, ...]:
    """Backends in the order in which they are tried. tokens: None is more than any bound."""
    sizes = {"tokens_up_to": float("inf") if tokens is None else tokens, "k_width_up_to": k_width}
    entries = table(name)[situation]
    entry = next(e for e in entries if all(sizes[b] <= e[b] for b in BOUNDS if b in e))
    return tuple(entry["order"])


def token_class(tokens: int, bounds: Sequence[int]) -> int | None:
    """The smallest bound that holds so many tokens, None if there is none. Only comparisons, so
    that torch.compile may leave the number of tokens open."""
    for bound in bounds:
        if tokens <= bound:
            return bound
    return None


@functools.cache
def token_bounds(name: str) -> tuple[int, ...]:
    """All bounds on tokens of a table, rising."""
    entries = [entry for entries in table(name).values() for entry in entries]
    return tuple(sorted({entry["tokens_up_to"] for entry in entries if "tokens_up_to" in entry}))


@functools.cache
def table(name: str) -> dict[str, list[Entry]]:
    """A device's file, of which missing situations come from default.toml."""
    path = FOLDER / f"{name}.toml"
    read = tomllib.loads(path.read_text(encoding="utf-8"))
    check(path, read)
    return read if name == DEFAULT else {**table(DEFAULT), **read}


def check(path: Path, read: Mapping[str, Sequence[Entry]]) -> None:
    """ValueError for a table that leaves calls without an order."""
    for situation, entries in read.items():
        known = situation in SITUATIONS and all({*e} <= {"order", *BOUNDS} for e in entries)
        if not known or any(bound in entries[-1] for bound in BOUNDS) or not all_ordered(entries):
            raise ValueError(
                f"{path}: got [[{situation}]] {list(entries)}, expected a situation of "
                f"{', '.join(SITUATIONS)}, each entry with an order, the bounds "
                f"{' and '.join(BOUNDS)} if any, and none in the last; mend the table"
            )


def all_ordered(entries: Sequence[Entry]) -> bool:
    return all(entry.get("order") for entry in entries)


def unknown(read: Mapping[str, Sequence[Entry]], backends: Collection[str]) -> set[str]:
    """Names in a table that are no backends."""
    named = {name for entries in read.values() for entry in entries for name in entry["order"]}
    return named - set(backends)


def write(path: Path, read: Mapping[str, Sequence[Entry]], *, heading: str) -> None:
    """Write a device's file. heading: comment lines, what was measured where."""
    check(path, read)
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for situation in sorted(read):
        for entry in read[situation]:
            lines += ["", f"[[{situation}]]"]
            lines += [f"{bound} = {entry[bound]}" for bound in BOUNDS if bound in entry]
            quoted = ", ".join(f'"{name}"' for name in entry["order"])
            lines += [f"order = [{quoted}]"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
