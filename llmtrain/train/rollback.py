"""Going back to a checkpoint and past the data that spoiled the steps after it.

A run's course is what it did since its latest rollback; courses count from 0. A checkpoint keeps
its course and the data passed over so far. Between a rollback and the next checkpoint only the
ledger knows of it, so a start reads there what its checkpoint does not know yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain import checkpoint
from llmtrain.checkpoint import BadCheckpoint
from llmtrain.data.skips import DataSteps
from llmtrain.distributed import World, broadcast_object
from llmtrain.exits import RunFailed
from llmtrain.train import resume
from llmtrain.train.guard import Skip
from llmtrain.train.runlog import read_lines


@dataclass(frozen=True, kw_only=True)
class Course:
    """number: rollbacks so far; data: which data each step reads."""

    number: int = 0
    data: DataSteps = field(default_factory=DataSteps)

    @classmethod
    def of(cls, trainer: dict) -> Course:
        """That of a checkpoint, from its trainer.json."""
        return cls(
            number=trainer.get("course", 0), data=DataSteps.of(trainer.get("data_skips", ()))
        )

    def to_trainer(self) -> dict:
        return {"course": self.number, "data_skips": [list(skip) for skip in self.data.skips]}

    def next(self, first: int, end: int) -> Course:
        """The course after a rollback that passes over the data steps first .. end - 1."""
        return Course(number=self.number + 1, data=self.data.passing_over(first, end))

    def known_to(self, run_dir: Path, step: int, *, stream: str, rows: int) -> Course:
        """With the rollbacks in the ledger that a checkpoint of that step does not know.

        stream: hash of the data order, rows: of a step. Passed over is only what lies ahead: a
        checkpoint from within a stretch that was left has its data behind it, and starts a course
        of its own.
        """
        course = self
        for event in rollbacks(run_dir):
            first, end = event["data_steps"]
            same = event["data_stream"] == stream and event["samples"] == [first * rows, end * rows]
            follows = event["course"] == course.number + 1 and first >= course.data.at(step)
            if same and follows:
                course = course.next(first, end)
        return course


def rollbacks(run_dir: Path) -> list[dict]:
    """The lines of the ledger that tell of rollbacks."""
    ledger = read_lines(run_dir / "ledger.jsonl")
    return [line for line in ledger if line.get("event") == "rollback"]


def go_back(
    run_dir: Path, first: int, start: Path | None, load: Callable[[Path], None], world: World
) -> Path | None:
    """Load the newest good checkpoint from before step `first`, or where this run started (None:
    from scratch); returns it. All ranks call it. RunFailed when there is none though there should
    be."""
    older = broadcast_object(
        [path for step, path in reversed(checkpoint.list_checkpoints(run_dir)) if step < first],
        world,
    )
    path = resume.first_loaded(older, load, world)
    if path is not None:
        return path
    wrong = f"rollback: steps from {first} on went wrong, but"
    if older:
        raise RunFailed(
            f"{wrong} every checkpoint in {run_dir} from before that is damaged (named above); "
            "continue from another one with train.resume=<folder>, or start over with "
            "train.resume=never"
        )
    if start is not None:
        try:
            resume.load_together(start, load, world)
        except BadCheckpoint as error:
            raise RunFailed(f"{wrong} {error}") from error
    return start


def reason(skips: Sequence[Skip]) -> str:
    """Why a run goes back, in the ledger's words."""
    first, last = skips[0], skips[-1]
    return (
        f"{len(skips)} of the steps {first.step} .. {last.step} skipped, the first: "
        f"{first.reason}, the last: {last.reason}"
    )


def exhausted(run_dir: Path, limit: int, skips: Sequence[Skip]) -> RunFailed:
    """The error of a run that would have to go back once more."""
    earlier = [
        f"from step {event['from_step']} to {event['to_step']}, past the samples "
        f"{event['samples'][0]} .. {event['samples'][1] - 1} ({event['reason']})"
        for event in rollbacks(run_dir)
    ]
    return RunFailed(
        f"training: {reason(skips)}, after {limit} rollbacks: {'; '.join(earlier)}; expected no "
        f"more than guard.max_rollbacks={limit}. ledger.jsonl has every step with its samples. If "
        "the losses there look sound, raise guard.loss_spike or guard.norm_spike; otherwise lower "
        "optimizer.lr, or look at the data; then continue with a larger guard.max_rollbacks"
    )
