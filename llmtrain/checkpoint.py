"""Checkpoints as folders: finding, checking and reading them. (Writing: llmtrain/train/.)

    <run_dir>/checkpoints/latest               the name of the newest checkpoint
    <run_dir>/checkpoints/step-00001234/
        manifest.json       format, step, world size, parameters with shapes, files with sha256
        rank-00000.safetensors ...  one file a rank, keys "<kind>|<name>|<offset>"
        trainer.json        step, counters, data position, the run's id
        config.yaml  tokenizer.json  token_bytes.npy

A fragment is a 1-D slice of a flattened parameter or buffer (kind param) or of a parameter's
optimizer state (AdamW: exp_avg, exp_avg_sq; Muon: momentum), starting at element <offset>. The
fragments of all files cover every tensor once, so any number of ranks, at any ZeRO stage, reads
what it needs. A checkpoint is good when its manifest (llmtrain/manifest.py) is, when every file has
the size and hashes written there, and when its fragments (llmtrain/fragments.py) cover every
tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from llmtrain.build import build_model
from llmtrain.fragments import FragmentReader, Wanted, check_parameters, read_index, uncovered
from llmtrain.manifest import (
    STEP_NAME,
    BadCheckpoint,
    Manifest,
    damaged,
    incomplete,
    read_manifest,
    share_of,
)
from llmtrain.model.language_model import LanguageModel

log = logging.getLogger(__name__)


def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the finished checkpoints of a run, oldest first, good or not: what bears
    the name of one and is a file is a bad one."""
    folder = Path(run_dir) / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def problems(path: str | Path, *, rank: int = 0, size: int = 1, content: bool = True) -> list[str]:
    """What is wrong with a checkpoint, naming each file; empty when it is good.

    rank, size: of those who check it together: each reads its share of the bytes, and what they
    find is to be joined. content: False leaves the bytes unread.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        found = incomplete(path, manifest)
        if content:
            found |= damaged(path, share_of(manifest, skip=found, rank=rank, size=size))
        if found or rank:
            return list(found.values())
        return uncovered(manifest, read_index(path, manifest))
    except BadCheckpoint as error:
        return [str(error).removeprefix(f"checkpoint {path}: ")]


def problems_but_tensors(path: Path) -> list[str]:
    """What is wrong with a checkpoint, the content of the ranks' files aside: load() reads that."""
    try:
        manifest = read_manifest(path)
        found = incomplete(path, manifest)
        found |= damaged(path, share_of(manifest, skip={*found, *manifest.rank_files}))
        return list(found.values())
    except BadCheckpoint as error:
        return [str(error).removeprefix(f"checkpoint {path}: ")]


def load(path: Path, wanted: Iterable[Wanted], *, rank: int = 0, size: int = 1) -> list[str]:
    """Fill tensors while the ranks' files are verified; what is wrong with them, as of problems().

    Every byte is read once where a rank wants what is in its own share. The tensors are not to be
    used unless no rank found anything.
    """
    try:
        reader = FragmentReader(path)
        skip = reader.manifest.files.keys() - set(reader.manifest.rank_files)
        share = share_of(reader.manifest, skip=skip, rank=rank, size=size)
        found = reader.read_all(wanted, share)
        if found or rank:
            return list(found.values())
        return uncovered(reader.manifest, reader.index)
    except BadCheckpoint as error:
        # A damaged header may say anything; hashes tell more, to the rank whose share it is.
        text = str(error).removeprefix(f"checkpoint {path}: ")
        return problems(path, rank=rank, size=size) or [text]


def refuse(path: Path, found: list[str]) -> None:
    """BadCheckpoint that names all of the problems found, if there are any."""
    if found:
        shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" * (len(found) > 8))
        advised = "; " in found[0]  # what the manifest itself was refused for
        raise BadCheckpoint(
            f"checkpoint {path}: {shown}" + ("" if advised else "; use another checkpoint")
        )


def verify(path: str | Path) -> Manifest:
    """Check every byte of a checkpoint against its manifest. BadCheckpoint naming each problem."""
    refuse(Path(path), problems(path))
    return read_manifest(path)


def newest_good(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are named in the log."""
    for _, path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
        except BadCheckpoint as error:
            log.warning("not used: %s", error)
        else:
            return path
    return None


def resolve(path: str | Path) -> Path:
    """A verified checkpoint folder: path itself, or the newest good one of the run folder path."""
    path = Path(path)
    if (path / "manifest.json").exists() or not list_checkpoints(path):
        verify(path)
        return path
    newest = newest_good(path)
    if newest is None:
        raise only_damaged(path)
    return newest


def only_damaged(run_dir: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"checkpoint {run_dir}: got only damaged checkpoints in this run folder, expected a good "
        "one; the log above names what is wrong with each"
    )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained model, ready for evaluation. token_bytes: int64 [O], bytes of each token id."""

    model: LanguageModel
    config: dict
    tokenizer_file: Path
    token_bytes: Tensor
    step: int
    path: Path


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """The model of a checkpoint folder, or of the newest good checkpoint of a run folder.

    dtype: of the activations; parameters are float32.
    """
    folder = resolve(path)
    reader = FragmentReader(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    model = build_model(config, vocab_size=reader.manifest.vocab_size, compute_dtype=dtype)
    # The trainer's module holds the model as `model`, beside the objective.
    fill(reader, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    token_bytes = torch.from_numpy(np.load(folder / "token_bytes.npy").astype(np.int64))
    return Loaded(
        model=model.to(device).eval(),
        config=config,
        tokenizer_file=folder / "tokenizer.json",
        token_bytes=token_bytes,
        step=reader.manifest.step,
        path=folder,
    )


def fill(reader: FragmentReader, tensors: dict[str, Tensor]) -> None:
    """Read the whole model: parameters and buffers; the objective's own are left out."""
    stored = reader.manifest.parameters
    others = {name: tuple(stored[name]) for name in stored if not name.startswith("model.")}
    shapes = others | {name: tuple(t.shape) for name, t in tensors.items()}
    check_parameters(reader.path, reader.manifest, shapes)
    reader.read_all(
        Wanted(kind="param", name=name, offset=0, out=tensor.view(-1))
        for name, tensor in tensors.items()
    )
