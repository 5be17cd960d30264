"""Where to continue, and whether the configuration still means the same training."""

from __future__ import annotations

import fnmatch
import json
import logging
from pathlib import Path

import torch
import yaml
from torch import nn

from llmtrain import checkpoint
from llmtrain.checkpoint import FragmentReader
from llmtrain.config import diff
from llmtrain.distributed import World, broadcast_object
from llmtrain.train.engine import Engine

log = logging.getLogger(__name__)

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
    "train.activation_checkpointing",
    "train.device",
    "train.log_every",
    "train.val_every",
    "train.val_tokens",
    "train.save_every",
    "train.keep",
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
    "tokenizer.*",  # the corpus counts: its fingerprint is compared
    "data.*",
)
# ... except, of these, what changes the order of the data.
MAY_NOT_CHANGE = ("data.weights", "data.weights.*")


# What a run writes into its folder.
WRITTEN = (
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


def choose(resume: str, run_dir: Path, world: World) -> Path | None:
    """The checkpoint to continue from (verified), or None to start from scratch. All ranks call it.

    resume: auto, never, or a checkpoint or run folder.
    """
    path, failure = None, None
    if world.rank == 0:
        try:
            path = choose_alone(resume, run_dir)
        except ValueError as error:
            failure = str(error)
    path, failure = broadcast_object((path, failure), world)
    if failure:
        raise ValueError(failure)
    return path


def choose_alone(resume: str, run_dir: Path) -> Path | None:
    if resume not in ("auto", "never"):
        if not Path(resume).is_dir():
            raise ValueError(
                f"train.resume: got {resume!r}, which is no folder, expected auto, never, or a "
                "checkpoint folder; list those of a run with `ls <run_dir>/checkpoints`"
            )
        path = checkpoint.resolve(resume)
    elif resume == "auto":
        path = checkpoint.newest_good(run_dir)
        if path is None and checkpoint.list_checkpoints(run_dir):
            raise ValueError(
                f"train.resume=auto: every checkpoint in {run_dir} is damaged (named above), "
                "expected one to continue from; set train.resume=never to start over"
            )
    else:
        set_run_aside(run_dir)
        return None
    if path is not None:
        set_later_aside(run_dir, checkpoint.read_manifest(path).step)
    return path


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
            "back to continue it, or start over with train.resume=never or another run_dir"
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
    """Weights, optimizer state and, at the same number of ranks, random generators."""
    reader = FragmentReader(path)
    reader.check_parameters(engine.shapes)
    for fragment in engine.to_load():
        for kind, view in fragment.views.items():
            reader.read(kind, fragment.name, fragment.offset, view)
    engine.loaded(trainer["optimizer_steps"])
    world = engine.world
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
