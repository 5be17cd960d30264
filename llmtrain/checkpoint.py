"""The checkpoint format, and reading it. (Writing: llmtrain/train/checkpoint.py.)

    <run_dir>/checkpoints/latest               the name of the newest checkpoint
    <run_dir>/checkpoints/step-00001234/
        manifest.json       format, step, world size, parameters with shapes, files with sha256
        rank-00000.safetensors ...  one file a rank, keys "<kind>|<name>|<offset>"
        trainer.json        step, counters, data position
        config.yaml  tokenizer.json  token_bytes.npy

A fragment is a 1-D slice of a flattened parameter or buffer (kind param) or of a parameter's
optimizer state (AdamW: exp_avg, exp_avg_sq; Muon: momentum), starting at element <offset>. The
fragments of all files cover every tensor once, so any number of ranks, at any ZeRO stage, reads
what it needs. A checkpoint is good when every file in its manifest has the size and hash written
there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.build import build_model
from llmtrain.model.language_model import LanguageModel

log = logging.getLogger(__name__)

FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{8,})")


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used: what is wrong with it, and where."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """files: name -> {"size": bytes, "sha256": hex}; parameters: name -> shape, buffers too."""

    step: int
    world_size: int
    vocab_size: int
    code_version: str
    parameters: dict[str, list[int]]
    files: dict[str, dict]
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the finished checkpoints of a run, oldest first, good or not."""
    folder = Path(run_dir) / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a checkpoint folder."""
    file = Path(path) / "manifest.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpoint(
            f"checkpoint {path}: got no manifest.json, expected a checkpoint folder (step-...); "
            "give a run folder or one of the folders in its checkpoints/"
        ) from error
    except json.JSONDecodeError as error:
        raise BadCheckpoint(f"checkpoint {path}: manifest.json is damaged ({error})") from error
    if content.get("format") != FORMAT:
        raise BadCheckpoint(
            f"checkpoint {path}: got format {content.get('format')}, expected {FORMAT}; read it "
            "with the version of llmtrain that wrote it"
        )
    return Manifest(**content)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest. Raises BadCheckpoint naming it."""
    path = Path(path)
    manifest = read_manifest(path)

    def check(name: str, expected: dict) -> None:
        file = path / name
        if not file.is_file():
            raise BadCheckpoint(f"checkpoint {path}: file {name} is missing; use another one")
        size = file.stat().st_size
        if size != expected["size"]:
            raise BadCheckpoint(
                f"checkpoint {path}: {name} is damaged: got {size} bytes, expected "
                f"{expected['size']}; use another checkpoint"
            )
        digest = sha256_of(file)
        if digest != expected["sha256"]:
            raise BadCheckpoint(
                f"checkpoint {path}: {name} is damaged: got sha256 {digest[:12]}..., expected "
                f"{expected['sha256'][:12]}...; use another checkpoint"
            )

    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter lock
        list(pool.map(lambda item: check(*item), manifest.files.items()))
    return manifest


def newest_good(run_dir: str | Path, *, before: int | None = None) -> Path | None:
    """The newest checkpoint (from before a step) that verifies, or None; damaged ones are named in
    the log."""
    for step, path in reversed(list_checkpoints(run_dir)):
        if before is not None and step >= before:
            continue
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
        raise BadCheckpoint(
            f"checkpoint {path}: got only damaged checkpoints in this run folder, expected a good "
            "one; the log above names what is wrong with each"
        )
    return newest


class FragmentReader:
    """Random access to the fragments of a checkpoint, over all its rank files."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(path)
        # (kind, name) -> sorted (offset, elements, file, key)
        self.index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        self.files = {}
        for name in sorted(self.manifest.files):
            if not name.endswith(".safetensors"):
                continue
            try:
                self.files[name] = safe_open(self.path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"checkpoint {path}: cannot read {name}: {error}") from error
            for key in self.files[name].keys():  # noqa: SIM118 (not a dict)
                kind, parameter, offset = key.split("|")
                elements = self.files[name].get_slice(key).get_shape()[0]
                entry = (int(offset), elements, name, key)
                self.index.setdefault((kind, parameter), []).append(entry)
        for entries in self.index.values():
            entries.sort()

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError unless the checkpoint holds exactly these parameters."""
        stored = {name: tuple(shape) for name, shape in self.manifest.parameters.items()}
        if stored == shapes:
            return
        missing, unknown = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
        problems = [f"{name} is not in it" for name in sorted(missing)]
        problems += [f"{name} is not in the model" for name in sorted(unknown)]
        problems += [
            f"{name} is {list(stored[name])} in it, {list(shapes[name])} in the model"
            for name in sorted(stored.keys() & shapes.keys())
            if stored[name] != shapes[name]
        ]
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise ValueError(
            f"checkpoint {self.path}: its parameters are not the model's: {shown}; use the "
            "configuration that it was trained with (config.yaml beside its manifest)"
        )

    @torch.no_grad()
    def read(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        """Fill out (1-D view) with elements offset .. offset + len(out) of a flattened tensor."""
        end, filled = offset + out.numel(), 0
        for start, elements, file, key in self.index.get((kind, name), ()):
            low, high = max(offset, start), min(end, start + elements)
            if low < high:
                piece = self.files[file].get_slice(key)[low - start : high - start]
                out[low - offset : high - offset].copy_(piece)
                filled += high - low
        if filled != out.numel():
            raise BadCheckpoint(
                f"checkpoint {self.path}: {kind} of {name}: got {filled} of the elements {offset} "
                f".. {end}, expected all; a rank's file is missing from its manifest"
            )

    def ranks_key(self, kind: str, rank: int) -> Tensor | None:
        """A tensor that belongs to one rank (random generator states); None if it has none."""
        for _, _, file, key in self.index.get((kind, str(rank)), ()):
            return self.files[file].get_tensor(key)
        return None


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
    reader.check_parameters(others | {name: tuple(t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        reader.read("param", name, 0, tensor.view(-1))
