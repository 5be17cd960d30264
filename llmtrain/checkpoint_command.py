"""`llmtrain checkpoint`: list the checkpoints of a run, verify them, make one file of weights."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmtrain import checkpoint
from llmtrain.build import DTYPES
from llmtrain.checkpoint import BadCheckpoint, FragmentReader, Wanted
from llmtrain.manifest import read_manifest

ACTIONS = ("list", "verify", "consolidate")
# Action -> the keys it reads.
READS = {
    "list": ("run_dir",),
    "verify": ("run_dir", "checkpoint"),
    "consolidate": ("checkpoint", "out", "dtype"),
}
# Files beside the weights: config.yaml and what the tokenizer needs.
BESIDE = ("config.yaml", "tokenizer.json", "token_bytes.npy")


def split_action(overrides: Sequence[str]) -> list[str]:
    """`list run_dir=x` -> `action=list run_dir=x`. ValueError without an action."""
    words = [word for word in overrides if "=" not in word]
    if len(words) != 1 or words[0] not in ACTIONS:
        raise ValueError(
            f"llmtrain checkpoint: got {' '.join(words) or 'no action'}, expected one of "
            f"{', '.join(ACTIONS)}; write e.g. `llmtrain checkpoint list run_dir=runs/first`"
        )
    return [f"action={words[0]}", *(word for word in overrides if "=" in word)]


def check(config: dict) -> None:
    """ValueError for keys that the action lacks or does not read."""
    action = config["action"]
    for typed in config["overrides"]:
        if typed.partition("=")[0] not in ("action", *READS[action]):
            raise ValueError(
                f"{typed}: has no effect on `llmtrain checkpoint {action}`, which reads "
                f"{', '.join(READS[action])}; remove it"
            )
    wanted = {"list": ["run_dir"], "consolidate": ["checkpoint", "out"]}.get(action, [])
    for key in wanted:
        if config[key] is None:
            raise ValueError(f"{key}: no value, expected one for {action}; add {key}=...")
    if action == "verify" and (config["run_dir"] is None) == (config["checkpoint"] is None):
        raise ValueError(
            "llmtrain checkpoint verify: expected either run_dir=<run folder>, for all of its "
            "checkpoints, or checkpoint=<checkpoint folder>, for one; give one of them"
        )
    if action == "consolidate" and not str(config["out"]).endswith(".safetensors"):
        raise ValueError(
            f"out: got {config['out']}, expected a file name that ends in .safetensors; set out=..."
        )


def run(config: dict) -> int:
    """Carry out the action; the exit code."""
    check(config)
    if config["action"] == "list":
        return show(Path(config["run_dir"]))
    if config["action"] == "verify":
        return verify(config["run_dir"], config["checkpoint"])
    consolidate(Path(config["checkpoint"]), Path(config["out"]), DTYPES[config["dtype"]])
    return 0


def checkpoints_of(run_dir: Path) -> list[Path]:
    found = [path for _, path in checkpoint.list_checkpoints(run_dir)]
    if not found:
        raise ValueError(
            f"run_dir: got {run_dir}, which has no checkpoints, expected a run folder with "
            "checkpoints/step-...; check the path"
        )
    return found


def show(run_dir: Path) -> int:
    """One line a checkpoint. Names, sizes and manifests are checked, content is not read."""
    paths = checkpoints_of(run_dir)
    print(f"{'step':>10} {'size':>10} {'age':>8} {'ranks':>5}  state (`verify` reads every byte)")
    for path in paths:
        found = checkpoint.problems(path, content=False)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        age = duration(time.time() - path.stat().st_mtime)
        try:
            ranks = str(read_manifest(path).world_size)
        except BadCheckpoint:
            ranks = "?"
        state = f"damaged: {'; '.join(found)}" if found else "complete"
        step = int(path.name.removeprefix("step-"))
        print(f"{step:>10} {readable(size):>10} {age:>8} {ranks:>5}  {state}")
    return 0


def verify(run_dir: str | None, folder: str | None) -> int:
    """Read every byte; 1 when anything is damaged."""
    code = 0
    for path in checkpoints_of(Path(run_dir)) if run_dir is not None else [Path(folder)]:
        found = checkpoint.problems(path)
        code |= bool(found)
        lines = [f"{path}: damaged", *(f"  {text}" for text in found)]
        print("\n".join(lines) if found else f"{path}: good")
    return code


def consolidate(path: Path, out: Path, dtype: torch.dtype) -> None:
    """One safetensors file of a model's weights, with its configuration and tokenizer beside it.

    path: checkpoint folder, or run folder (the newest good one). Names are those of the model's
    state_dict. The objective's own parameters and the optimizer's state stay behind.
    """
    targets = [out, *(out.parent / name for name in BESIDE)]
    for target in targets:
        if target.exists():
            raise ValueError(
                f"out: {target} exists and is not overwritten, expected a folder without "
                f"{', '.join(BESIDE)} and this file; set out=<new folder>/{out.name}"
            )
    folder = checkpoint.resolve(path)
    reader = FragmentReader(folder)
    tensors, wanted = {}, []
    for name, shape in reader.manifest.parameters.items():
        if name.startswith("model."):
            tensor = torch.empty(shape, dtype=reader.dtype_of("param", name))
            tensors[name.removeprefix("model.")] = tensor
            wanted.append(Wanted(kind="param", name=name, offset=0, out=tensor.view(-1)))
    reader.read_all(wanted)
    if dtype != torch.float32:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    metadata = {"format": "pt", "step": str(trainer["step"]), "checkpoint": folder.name}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        for name in BESIDE:
            shutil.copyfile(folder / name, out.parent / name)
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"{out}: {len(tensors)} tensors, {count:,} numbers of {folder}, "
        f"{readable(out.stat().st_size)}"
    )


def readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.2f} TiB"


def duration(seconds: float) -> str:
    """12 s, 3 min, 5.2 h, 3.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} d"
