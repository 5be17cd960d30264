"""Mirrors of metrics.jsonl in other people's viewers. Imported only when chosen."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Protocol


class Tracker(Protocol):
    """Receives what metrics.jsonl receives, on rank 0."""

    def start(self, run_dir: Path, *, config: dict, resumed_step: int) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def optional(module: str, extra: str, option: str) -> ModuleType:
    """Import an optional package. ImportError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"tracker={option}: needs the package {extra} ({error}); install it with "
            f"`pip install llmtrain[{extra}]`, or set tracker=none"
        ) from error


class Silent:
    """tracker=none: metrics.jsonl only."""

    def start(self, run_dir: Path, *, config: dict, resumed_step: int) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files in <run_dir>/tensorboard: `tensorboard --logdir runs`."""

    def start(self, run_dir: Path, *, config: dict, resumed_step: int) -> None:
        tensorboard = optional("torch.utils.tensorboard", "tensorboard", "tensorboard")
        # purge_step hides what an interrupted run wrote beyond the checkpoint it resumed from
        self.writer = tensorboard.SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resumed_step + 1
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, offline unless an account is there (WANDB_API_KEY or `wandb login`).

    project: where runs are collected; entity: the team, null for the user's default.
    """

    def __init__(self, *, project: str, entity: str | None):
        self.project, self.entity = project, entity

    def start(self, run_dir: Path, *, config: dict, resumed_step: int) -> None:
        wandb = optional("wandb", "wandb", "wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if has_account() else "offline")
        # An offline run cannot be resumed: each start is a run of its own, joined by the group.
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=f"{run_dir.name}@{resumed_step}" if resumed_step else run_dir.name,
            group=run_dir.name,
            config=config,
            dir=str(run_dir),
            mode=mode,
            settings=wandb.Settings(console="off", quiet=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def has_account() -> bool:
    """Whether W&B finds an API key without asking."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "api.wandb.ai" in netrc.read_text(encoding="utf-8")
    return known or bool(os.environ.get("WANDB_API_KEY"))


class All:
    """TensorBoard and Weights & Biases."""

    def __init__(self, *, project: str, entity: str | None):
        self.trackers = (TensorBoard(), WandB(project=project, entity=entity))

    def start(self, run_dir: Path, *, config: dict, resumed_step: int) -> None:
        for tracker in self.trackers:
            tracker.start(run_dir, config=config, resumed_step=resumed_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
