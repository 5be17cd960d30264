"""`llmtrain bench`: which benchmark, the keys that it reads, and what all of them write down."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from llmtrain.distributed import choose_device, discover

ACTIONS = ("step", "data", "kernels")
# Action -> the keys that it alone reads.
READS = {
    "step": ("contenders", "precision", "compile", "changes", "intervals", "limit", "only"),
    "data": (),
    "kernels": ("peers", "only"),
}
READ_BY_ALL = ("action", "quick", "budget", "out", "device")


def split_action(overrides: Sequence[str]) -> list[str]:
    """`step quick=true` -> `action=step quick=true`. ValueError without an action."""
    words = [word for word in overrides if "=" not in word]
    if len(words) != 1 or words[0] not in ACTIONS:
        raise ValueError(
            f"llmtrain bench: got {' '.join(words) or 'no action'}, expected one of "
            f"{', '.join(ACTIONS)}; write e.g. `llmtrain bench step quick=true`"
        )
    return [f"action={words[0]}", *(word for word in overrides if "=" in word)]


def check(config: dict) -> None:
    """ValueError for keys that the action does not read."""
    action = config["action"]
    for typed in config["overrides"]:
        if typed.partition("=")[0] not in (*READ_BY_ALL, *READS[action]):
            raise ValueError(
                f"{typed}: has no effect on `llmtrain bench {action}`, which reads "
                f"{', '.join((*READ_BY_ALL[1:], *READS[action]))}; remove it"
            )


def choose(key: str, only: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that were asked for, in their own order; all when none was. ValueError for others.

    key: of the configuration, whose value is `only`.
    """
    for name in only:
        if name not in known:
            raise ValueError(
                f"{key}: got {name!r}, expected some of {', '.join(known) or '(there are none)'}; "
                f"fix {key}=[...]"
            )
    return [name for name in known if not only or name in only]


def run(config: dict) -> int:
    """Run the action; returns the exit code."""
    check(config)
    device = choose_device(config["device"], discover(os.environ))
    out = Path(config["out"])
    out.mkdir(parents=True, exist_ok=True)
    write(out / "machine.json", machine(device))
    if config["action"] == "step":
        from llmtrain.bench.step import bench_step

        return bench_step(config, device, out)
    if config["action"] == "data":
        from llmtrain.bench.data import bench_data

        return bench_data(config, device, out)
    from llmtrain.bench.kernels import bench_kernels

    return bench_kernels(config, device, out)


def machine(device: torch.device) -> dict:
    """What the numbers were taken on."""
    from llmtrain.train.runlog import git_state, versions

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "versions": versions(),
        "commit": git_state()[0],
    }


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
