"""What must hold after every kill, and what a finished run must share with its twin.

Tensors are read with the safetensors library and compared as bytes; nothing of llmtrain is used.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from safetensors.numpy import load_file

from soak.folder import UNFINISHED, Folder, State

# Names in logs whose values are times, rates and memory of the machine.
MACHINE = (
    "tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "memory_gib",
    "mfu",
    "time",
    "seconds",
)
# Keys of the configuration in which a run and its twin differ.
OWN = ("run_dir", "overrides", "train.async_save")


def after_kill(before: State, now: State, keep: int) -> list[str]:
    """Violations, given the run folder before the start that was killed, and after."""
    problems = []
    ever = before.good | now.good
    newest = set(sorted(ever)[-keep:])
    lost = sorted(newest - now.good)
    if lost:
        what = {step: now.bad.get(step, "gone") for step in lost}
        problems.append(f"good checkpoints lost though among the {keep} newest: {what}")
    if before.good and not now.good:
        problems.append("no good checkpoint is left")
    for step, damage in now.bad.items():
        # Deleting an old one may be interrupted; then it is beyond the kept ones.
        if not newest or step >= min(newest):
            problems.append(f"step-{step:08d} has its final name and is damaged: {damage}")
    if now.latest is not None and now.latest_step not in now.good:
        problems.append(f"latest names {now.latest!r}, which is no good checkpoint")
    if before.latest is not None and now.latest is None:
        problems.append("latest is gone")
    if now.good - before.good:  # a save was finished: it had to clear what lay there
        stale = sorted(n for n in before.leftovers.keys() & now.leftovers if "latest" not in n)
        problems += [f"{name} outlived the next save" for name in stale]
    if sum(UNFINISHED in name for name in now.leftovers) > 1:
        problems.append(f"temporary folders pile up: {sorted(now.leftovers)}")
    return problems


def resumed_right(before: State, now: State) -> list[str]:
    """Each start that came as far as its first line continued from the newest good checkpoint."""
    expected = max(before.good, default=0)
    return [
        f"a start resumed at step {start['resumed_step']}, expected {expected}"
        for start in now.starts[len(before.starts) :]
        if start["resumed_step"] != expected
    ]


def plain(line: dict) -> dict:
    """A line of a log without what the machine decides."""
    return {name: value for name, value in line.items() if name not in MACHINE}


def log_differences(name: str, got: list[dict], expected: list[dict]) -> list[str]:
    """First difference of two logs, and their lengths."""
    problems = []
    if len(got) != len(expected):
        steps = [line.get("step") for line in got]
        twice = sorted({step for step in steps if steps.count(step) > 1})
        problems.append(f"{name}: {len(got)} lines, the twin has {len(expected)}; twice: {twice}")
    for one, other in zip(got, expected):
        if plain(one) != plain(other):
            keys = [k for k in {**one, **other} if plain(one).get(k) != plain(other).get(k)]
            values = {key: (one.get(key), other.get(key)) for key in keys}
            problems.append(f"{name}, step {one.get('step')}: {values} (run, twin)")
            break
    return problems


def prefix_differences(now: State, twin: State) -> list[str]:
    """The ledger of a killed run is the beginning of its twin's."""
    return log_differences("ledger.jsonl", now.ledger, twin.ledger[: len(now.ledger)])


def tensors_of(checkpoint: Path) -> dict[str, object]:
    """ "<file>: <key>" -> array, of all rank files."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, value in load_file(path).items():
            found[f"{path.name}: {key}"] = value
    return found


def checkpoint_differences(run: Path, twin: Path) -> list[str]:
    """Two checkpoint folders, bit for bit."""
    one, other = tensors_of(run), tensors_of(twin)
    problems = [f"{run.name}: only one has {key}" for key in sorted(one.keys() ^ other.keys())]
    different = [
        key
        for key in sorted(one.keys() & other.keys())
        if one[key].dtype != other[key].dtype or one[key].tobytes() != other[key].tobytes()
    ]
    if different:
        problems.append(
            f"{run.name}: {len(different)} of {len(one)} tensors differ: {different[:3]}"
        )
    for name in ("tokenizer.json", "token_bytes.npy"):
        if (run / name).read_bytes() != (twin / name).read_bytes():
            problems.append(f"{run.name}/{name} differs")
    one, other = (json.loads((path / "trainer.json").read_text()) for path in (run, twin))
    one.pop("run_id", None), other.pop("run_id", None)
    if one != other:
        values = {k: (one.get(k), other.get(k)) for k in {**one, **other}}
        changed = {k: pair for k, pair in values.items() if pair[0] != pair[1]}
        problems.append(f"{run.name}/trainer.json: {changed} (run, twin)")
    one, other = (config_of(path / "config.yaml") for path in (run, twin))
    if one != other:
        problems.append(f"{run.name}/config.yaml differs")
    return problems


def config_of(path: Path) -> dict:
    """A configuration without what belongs to one run."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in OWN:
        section, _, name = key.rpartition(".")
        (config[section] if section else config).pop(name, None)
    return config


def finished_differences(run: Path, twin: Path, steps: int) -> list[str]:
    """A finished run against its undisturbed twin: checkpoints, ledger, metrics, leftovers."""
    one, other = Folder(run), Folder(twin)
    now, expected = one.state(), other.state()
    problems = [f"step-{step:08d}: {damage}" for step, damage in now.bad.items()]
    if now.good != expected.good or steps not in now.good:
        problems.append(f"checkpoints {sorted(now.good)}, the twin has {sorted(expected.good)}")
    for step in sorted(now.good & expected.good):
        name = f"step-{step:08d}"
        problems += checkpoint_differences(one.checkpoints / name, other.checkpoints / name)
    if now.latest != expected.latest:
        problems.append(f"latest: {now.latest}, the twin has {expected.latest}")
    if now.leftovers:
        problems.append(f"left over: {now.leftovers}")
    counted = [line["step"] for line in now.ledger]
    if counted != list(range(1, steps + 1)):
        problems.append(f"ledger.jsonl: steps {counted}, expected 1 .. {steps} once each")
    problems += log_differences("ledger.jsonl", now.ledger, expected.ledger)
    for kind in ("train", "val"):
        got, wanted = (
            [line for line in state.metrics if line.get("kind") == kind]
            for state in (now, expected)
        )
        problems += log_differences(f"metrics.jsonl ({kind})", got, wanted)
    return problems
