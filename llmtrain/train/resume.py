"""Where to continue, and whether the configuration still means the same training."""

from __future__ import annotations

import fnmatch
import itertools
import json
import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from torch import nn

from llmtrain import checkpoint
from llmtrain.checkpoint import BadCheckpoint, FragmentReader, Wanted
from llmtrain.config import diff
from llmtrain.distributed import World, broadcast_object, gather_objects
from llmtrain.fragments import check_parameters
from llmtrain.train.engine import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")

# What may change between a checkpoint and the run that continues it: where and how fast it runs,
# what it logs, how long it goes on. Everything else decides what is learned.
MAY_CHANGE = (
    "name",
    "run_dir",
    "dry_run",
    "choices.*",
    "overrides",
    "train.total_tokens",
    "train.micro_batch",
    "train.compile",
    "train.cuda_graphs",
    "train.activation_checkpointing",
    "train.device",
    "train.log_every",
    "train.val_every",
    "train.val_tokens",
    "train.save_every",
    "train.async_save",
    "train.save_failures",
    "train.keep",
    "train.keep_every",
    "train.resume",
    "train.max_skipped",  # of older checkpoints; guard.max_skipped now
    "train.deterministic",
    "guard.*",
    "health.*",
    "schedule.*",
    "deepspeed.*",
    "tracker.*",
    "mixer.backend",
    "mixers.*.backend",
    "channel.backend",
    "channels.*.backend",
    "objective.chunk_tokens",
    "objective.backend",
    "tokenizer.*",  # the corpus counts: its fingerprint is compared
    "data.*",
)
# ... except, of these, what changes the order of the data.
MAY_NOT_CHANGE = ("data.weights", "data.weights.*")


# What a run writes into its folder.
WRITTEN = (
    "run_id",
    "checkpoints",
    "config.yaml",
    "git.diff",
    "starts.jsonl",
    "metrics.jsonl",
    "ledger.jsonl",
    "faults",
    "hangs",
    "run.log",
    "summary.json",
    "tensorboard",
    "wandb",
)


@dataclass
class Candidates:
    """What a start may continue from, the newest first, without what was found damaged. All ranks
    call every method.

    resume: train.resume: auto, never, or a checkpoint or run folder.
    """

    resume: str
    run_dir: Path
    world: World
    paths: list[Path]

    @classmethod
    def of(cls, resume: str, run_dir: Path, world: World) -> Candidates:
        return cls(resume, run_dir, world, first_decides(lambda: find(resume, run_dir), world))

    def first(self) -> Path | None:
        """The one to begin with, its tensors not read yet; None: start from scratch."""
        return self.load(lambda path: None)

    def load(self, load: Callable[[Path], None]) -> Path | None:
        """The first that load(path) takes; damaged ones (BadCheckpoint) are named in the log."""
        if self.paths == [Path(self.resume)]:  # this one and no other
            load_together(self.paths[0], load, self.world)
            path = self.paths[0]
        else:
            path = first_loaded(self.paths, load, self.world)
        if path is not None:
            self.paths = self.paths[self.paths.index(path) :]
            first_decides(lambda: refuse_foreign(path, self.run_dir), self.world)
        elif self.paths:
            raise ValueError(
                f"train.resume={self.resume}: every checkpoint in {self.paths[0].parent} is "
                "damaged (named above), expected one to continue from; set train.resume=never to "
                "start over"
            )
        return path


def first_loaded(candidates: list[Path], load: Callable[[Path], None], world: World) -> Path | None:
    """The first checkpoint of these that load(path) takes; damaged ones are named in the log."""
    for path in candidates:
        try:
            load_together(path, load, world)
        except BadCheckpoint as error:
            log.warning("not used: %s", error)
        else:
            return path
    return None


def load_together(path: Path, load: Callable[[Path], None], world: World) -> None:
    """load(path), which verifies the tensors, after everything else is. BadCheckpoint on all
    ranks for a damaged one."""
    found = first_decides(lambda: checkpoint.problems_but_tensors(path), world)
    checkpoint.refuse(path, found)
    load(path)


def first_decides(action: Callable[[], T], world: World) -> T:
    """What action() gives on rank 0, on every rank; so is its ValueError."""
    result, failure = None, None
    if world.rank == 0:
        try:
            result = action()
        except ValueError as error:
            failure = str(error)
    result, failure = broadcast_object((result, failure), world)
    if failure:
        raise ValueError(failure)
    return result


def find(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoints to try, in this order."""
    if resume == "never":
        set_run_aside(run_dir)
        return []
    own = newest_first(run_dir)
    if resume == "auto":
        return own
    path = Path(resume)
    if not path.is_dir():
        raise ValueError(
            f"train.resume: got {resume!r}, which is no folder, expected auto, never, or a "
            "checkpoint folder; list those of a run with `llmtrain checkpoint list run_dir=...`"
        )
    if own and run_dir.resolve() not in (path.resolve(), *path.resolve().parents):
        if started_from(run_dir) != resume:
            raise ValueError(
                f"train.resume: got a checkpoint of another run, {resume}, but {run_dir} holds "
                "checkpoints of a run that did not start from it, expected a new run_dir; set "
                "run_dir=... (or name=...), or train.resume=auto to continue the run there"
            )
        log.warning("%s started from %s and has checkpoints of its own: continued", run_dir, path)
        return own
    if (path / "manifest.json").exists():
        return [path]
    if not newest_first(path):
        checkpoint.read_manifest(path)  # says that there is none
    return newest_first(path)


def newest_first(run_dir: Path) -> list[Path]:
    return [path for _, path in reversed(checkpoint.list_checkpoints(run_dir))]


def started_from(run_dir: Path) -> str | None:
    """train.resume of the latest start in a run folder."""
    try:
        saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return saved["train"]["resume"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def refuse_foreign(path: Path, run_dir: Path) -> None:
    """ValueError for what another run made."""
    theirs, ours = read_trainer(path).get("run_id"), read_run_id(run_dir)
    inside = run_dir.resolve() in path.resolve().parents
    if inside and ours and theirs and ours != theirs:
        raise ValueError(
            f"train.resume: {path} was made by run {theirs[:12]}, but {run_dir} is the folder of "
            f"run {ours[:12]} (its file run_id): two runs are mixed there, expected checkpoints "
            f"of one; move this one away, or start a run from it with train.resume={path} and a "
            "new run_dir"
        )


def read_run_id(run_dir: Path) -> str | None:
    """The id of the run whose folder this is; None before its first start."""
    file = run_dir / "run_id"
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ValueError(
            f"{file}: got {text[:40]!r}, expected 32 hexadecimal digits; write the run_id of a "
            "checkpoint's trainer.json into it, or remove it"
        )
    return text


def claim_run_id(run_dir: Path, start: Path | None, trainer: dict, world: World) -> str:
    """The id of the run in this folder, the same at every start. All ranks call it.

    start, trainer: the checkpoint to continue from and its counters.
    """

    def claim() -> str:
        if known := read_run_id(run_dir):
            return known
        continued = start is not None and run_dir.resolve() in start.resolve().parents
        run_id = (trainer.get("run_id") if continued else None) or uuid.uuid4().hex
        temporary = run_dir / "run_id.tmp"
        temporary.write_text(run_id + "\n", encoding="utf-8")
        temporary.replace(run_dir / "run_id")
        return run_id

    return first_decides(claim, world)


def settle_on(path: Path, run_dir: Path, world: World) -> None:
    """Set aside what is not continued. All ranks call it, when a checkpoint was loaded."""
    first_decides(lambda: set_later_aside(run_dir, checkpoint.read_manifest(path).step), world)


def set_later_aside(run_dir: Path, step: int) -> None:
    """Rename checkpoints beyond a step: they are damaged, or of a course that is left now."""
    for at, path in checkpoint.list_checkpoints(run_dir):
        if at > step:
            aside = free_name(path, "superseded")
            path.rename(aside)
            log.warning("%s is not continued, and now named %s", path, aside.name)


def set_run_aside(run_dir: Path) -> None:
    """Move what an earlier run left in this folder into previous-1, previous-2, ..."""
    found = [run_dir / name for name in WRITTEN if (run_dir / name).exists()]
    if found:
        aside = free_name(run_dir / "previous")
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        log.warning("train.resume=never: the earlier run in %s was moved to %s", run_dir, aside)


def free_name(path: Path, suffix: str = "") -> Path:
    """path-1, path-2, ... (or path.<suffix>-1 ...): the first that does not exist."""
    stem = f"{path.name}.{suffix}" if suffix else path.name
    number = 1
    while (candidate := path.with_name(f"{stem}-{number}")).exists():
        number += 1
    return candidate


def check_config(path: Path, config: dict) -> None:
    """ValueError naming the keys when this configuration cannot continue that checkpoint."""
    saved = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    changed = {
        key: values
        for key, values in diff(saved, config).items()
        if not matches(key, MAY_CHANGE) or matches(key, MAY_NOT_CHANGE)
    }
    if changed:
        shown = "; ".join(f"{key}: {old} then, {new} now" for key, (old, new) in changed.items())
        raise ValueError(
            f"train.resume: {path} was made with another configuration: {shown}. Set these keys "
            "back to continue it, or start over with train.resume=never or another run_dir. What "
            f"may change: {', '.join(MAY_CHANGE)}, without {', '.join(MAY_NOT_CHANGE)}"
        )


def read_trainer(path: Path) -> dict:
    """The checkpoint's counters."""
    return json.loads((path / "trainer.json").read_text(encoding="utf-8"))


def check_corpus(path: Path, trainer: dict, fingerprint: str) -> None:
    """ValueError when the checkpoint was trained on other tokens."""
    if trainer["data_fingerprint"] != fingerprint:
        raise ValueError(
            f"train.resume: {path} was trained on the corpus {trainer['data_fingerprint'][:12]}, "
            f"got {fingerprint[:12]} now; point data.root and data.name to the first one, or "
            "start over with train.resume=never or another run_dir"
        )


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def restore(path: Path, engine: Engine, trainer: dict) -> None:
    """Weights, optimizer state and, at the same number of ranks, random generators.

    BadCheckpoint on all ranks when one of them finds it damaged; the engine then holds nothing that
    is of use until another one is restored.
    """
    world = engine.world
    check_parameters(path, checkpoint.read_manifest(path), engine.shapes)
    wanted = [
        Wanted(kind=kind, name=fragment.name, offset=fragment.offset, out=view)
        for fragment in engine.to_load()
        for kind, view in fragment.views.items()
    ]
    found = checkpoint.load(path, wanted, rank=world.rank, size=world.size)
    found = itertools.chain(*gather_objects(found, world))
    checkpoint.refuse(path, list(dict.fromkeys(found)))
    engine.loaded(trainer["optimizer_steps"])
    reader = FragmentReader(path)
    if reader.manifest.world_size == world.size:
        set_generators({k: reader.ranks_key(k, world.rank) for k in GENERATORS}, engine.device)


# Keys of the generator states in a checkpoint; cuda only where the run has one.
GENERATORS = ("rng_cpu", "rng_cuda")


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's random generators on this rank, uint8."""
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: dict[str, torch.Tensor | None], device: torch.device) -> None:
    if states.get("rng_cpu") is not None:
        torch.set_rng_state(states["rng_cpu"])
    if states.get("rng_cuda") is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng_cuda"], device)


def reset(engine: Engine, module: nn.Module) -> None:
    """As before the first step: the weights and buffers of a freshly built module (on the host)."""
    fresh = module.state_dict()
    for fragment in engine.to_load():
        for kind, view in fragment.views.items():
            if kind == "param":
                whole = fresh[fragment.name].reshape(-1)
                view.copy_(whole[fragment.offset : fragment.offset + view.numel()])
            else:
                view.zero_()
    engine.loaded(0)
