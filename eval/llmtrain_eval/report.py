"""What an evaluation leaves behind: results.json (everything), results.md (one table), samples.

results.json: checkpoint (path, step, sha256 of its manifest), versions, config, environment,
warnings, and whichever were asked for: bits_per_byte, passkey, tasks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from llmtrain_data.shards import write_atomic
from lm_eval.utils import handle_non_serializable

# What an evaluation writes into its folder.
FILES = ("results.json", "results.md", "passkey.json", "passkey.png", "samples")

PACKAGES = ("llmtrain", "torch", "lm_eval", "transformers", "tokenizers", "datasets", "numpy")
# task, metric, value, standard error, items
Line = tuple[str, str, float | None, float | None, int | None]


def versions() -> dict[str, str]:
    """Python's and the packages' versions; a package run from its source folder has none."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def checkpoint_facts(folder: Path, step: int) -> dict:
    """Names a checkpoint. sha256: of its manifest, which holds the hashes of its other files."""
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return {"path": str(folder), "step": step, "sha256": digest}


def lines(results: dict) -> list[Line]:
    """The rows of the table."""
    table: list[Line] = []
    for name, one in results.get("bits_per_byte", {}).items():
        if one["bits_per_byte"] is not None:
            table.append((f"bits_per_byte: {name}", "bits/byte", one["bits_per_byte"], None, None))
    if passkey := results.get("passkey"):
        cells = len(passkey["lengths"]) * len(passkey["depths"]) * passkey["samples"]
        for kind in ("generate", "likelihood"):
            value, error = passkey[f"{kind}_accuracy"], passkey[f"{kind}_stderr"]
            table.append((f"passkey: {kind}", "accuracy", value, error, cells))
    for name, scores in results.get("tasks", {}).items():
        for metric, value in scores.items():
            if metric in ("samples", "shots") or "_stderr" in metric:
                continue
            stderr = scores.get(stderr_key(metric))
            table.append((name, metric, value, stderr, scores["samples"]))
    return table


def stderr_key(metric: str) -> str:
    """ "acc" -> "acc_stderr", "exact_match (strict)" -> "exact_match_stderr (strict)"."""
    name, space, filtered = metric.partition(" ")
    return f"{name}_stderr{space}{filtered}"


def markdown(results: dict) -> str:
    """The table of results.md and of the console."""
    head = ("task", "metric", "value", "stderr", "items")
    rows = [
        (task, metric, number(value, "n/a"), number(error, ""), str(items or ""))
        for task, metric, value, error, items in lines(results)
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]
        return f"| {' | '.join([*left, *right])} |"

    rule = [*("-" * width for width in widths[:2]), *("-" * (w - 1) + ":" for w in widths[2:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.4f}"


def set_aside(out: Path) -> None:
    """Move what an earlier evaluation left in the folder to previous-N in it, N = 1, 2, ..."""
    earlier = [out / name for name in FILES if (out / name).exists()]
    if not earlier:
        return
    number = 1
    while (out / f"previous-{number}").exists():
        number += 1
    folder = out / f"previous-{number}"
    folder.mkdir()
    for path in earlier:
        path.rename(folder / path.name)


def write(results: dict, out: Path) -> None:
    """results.json and results.md, each replaced as a whole."""
    facts, checkpoint = results["environment"], results["checkpoint"]
    notes = [f"- {warning}" for warning in results["warnings"]]
    text = [
        f"# {checkpoint['path']}, step {checkpoint['step']}",
        "",
        f"{facts['device']}, {facts['precision']}, {facts['ranks']} rank(s), "
        f"{facts['seconds']:.0f} s. Checkpoint sha256 {checkpoint['sha256'][:16]}.",
        "",
        markdown(results),
        "",
        *notes,
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", to_json(results, indent=1).encode())
    write_atomic(out / "results.md", "\n".join(text).encode())


def write_samples(samples: dict[str, list[dict]], out: Path) -> None:
    """samples/<task>.jsonl: every item with its requests, the model's answers and its scores."""
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for task, items in samples.items():
        content = "".join(to_json(item) + "\n" for item in items)
        write_atomic(folder / f"{task}.jsonl", content.encode())


def to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
