"""When to kill: moments that are aimed at, and where a kill landed by what it left behind.

start      within the time that a start takes (imports aside): store, group, model, DeepSpeed
restore    while a checkpoint's tensors are read
step       after a random step, within the next one
validate   while held-out rows are evaluated
save       within a save, from the appearance of its temporary folder on
manifest   when the manifest appears in the temporary folder: just before the rename
rename     when the folder has its final name: before, at or after the move of `latest`
delete     when `latest` moved: while old checkpoints are deleted
end        after the last step: last validation, last save, summary
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from soak.cells import KEEP, SAVE_EVERY, VAL_EVERY, Cell, deal
from soak.folder import DOOMED, UNFINISHED, Folder, State, reading_checkpoint, step_of
from soak.ranks import Job

# The deck that kills are dealt from: 5 of 12 into a save.
AIMS = (
    *("start", "restore", "step", "step", "step", "validate", "end"),
    *("save", "save", "manifest", "rename", "delete"),
)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One planned kill. share: 0 .. 1, where within the moment; ahead: how many steps or saves
    after the start it may come; victims: ranks."""

    moment: str
    share: float
    ahead: int
    victims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of an undisturbed run: until its first log line, of a step, a save, a validation, and
    from the last step to the end."""

    start: float
    step: float
    save: float
    validate: float
    end: float


def plan(cell: Cell, index: int, seed: int) -> list[Aim]:
    """The kills of a cell. index: its place in the matrix, so that cells share one deck."""
    deck = deal(AIMS, (index + 1) * cell.kills, f"{seed}/aims")
    draw = random.Random(f"{seed}/{index}/{cell.name}")
    aims = []
    for moment in deck[index * cell.kills :]:
        if moment == "validate" and not cell.validation:
            moment = "step"
        count = draw.choice([1, 1, cell.ranks])  # a process, or the whole machine at once
        aims.append(
            Aim(
                moment=moment,
                share=draw.random(),
                ahead=draw.randint(1, 2),
                victims=tuple(sorted(draw.sample(range(cell.ranks), count))),
            )
        )
    # The end comes once: after it there is nothing left to kill.
    aims.sort(key=lambda aim: aim.moment == "end")
    return aims


class Trigger:
    """Watches one start of a job for an aim's moment; fired() is asked again and again."""

    def __init__(self, aim: Aim, before: State, folder: Folder, job: Job, pace: Pace, steps: int):
        self.aim, self.before, self.folder = aim, before, folder
        self.job, self.pace, self.steps = job, pace, steps
        self.resumed = max(before.good, default=0)
        self.saves_left = max(1, -(-(steps - self.resumed) // SAVE_EVERY))
        self.count, self.shown = 0, False  # saves seen so far; whether one is being written now
        self.starts = folder.size("starts.jsonl")
        self.due: float | None = None  # seconds of the job at which to kill
        moment = aim.moment
        if moment == "restore" and not before.good:
            moment = "start"  # there is nothing to restore
        self.reached = getattr(self, f"reached_{moment}")

    def begun(self) -> bool:
        """Whether this start wrote its first line: until then the logs show an earlier one."""
        return self.folder.size("starts.jsonl") > self.starts

    def logged_step(self) -> int:
        """The last step of this start, or that which it resumed from."""
        return self.folder.logged_step() if self.begun() else self.resumed

    def fired(self) -> bool:
        if self.due is None:
            delay = self.reached()
            if delay is not None:
                self.due = self.job.seconds() + delay
        return self.due is not None and self.job.seconds() >= self.due

    def reached_start(self) -> float | None:
        return self.aim.share * self.pace.start

    def reached_restore(self) -> float | None:
        if reading_checkpoint(self.job.pids, self.folder.path):
            return self.aim.share * 0.02
        return self.reached_late()

    def reached_late(self) -> float | None:
        """The moment was missed: kill in the first steps instead."""
        return 0.0 if self.logged_step() >= self.resumed + 2 else None

    def reached_step(self) -> float | None:
        wanted = self.resumed + 1 + int(self.aim.share * self.aim.ahead * SAVE_EVERY)
        wanted = min(wanted, self.steps - 1)
        return self.aim.share * self.pace.step if self.logged_step() >= wanted else None

    def reached_validate(self) -> float | None:
        step = self.logged_step()
        if step <= self.resumed or step % VAL_EVERY or self.folder.validated_step() >= step:
            return None
        return self.aim.share * self.pace.validate

    def reached_save(self) -> float | None:
        return self.aim.share * self.pace.save if self.writing(None) else None

    def reached_manifest(self) -> float | None:
        return 0.0 if self.writing("manifest.json") else None

    def writing(self, file: str | None) -> bool:
        """Whether the aimed-at save of this start is being written, and has come to that file."""
        old = self.before.leftovers
        found = self.folder.unfinished().items()
        new = [left for name, left in found if name not in old or left.changed != old[name].changed]
        if new and not self.shown:
            self.count += 1
        self.shown = bool(new)
        wanted = new and self.count >= min(self.aim.ahead, self.saves_left)
        return bool(wanted) and (file is None or any(file in left.files for left in new))

    def reached_rename(self) -> float | None:
        new = {step for step in self.folder.finished() if step > self.resumed}
        enough = len(new) >= min(self.aim.ahead, self.saves_left)
        return self.aim.share * 0.002 if enough else None

    def reached_delete(self) -> float | None:
        latest = self.folder.latest()
        wanted = min(self.steps, self.resumed + self.aim.ahead * SAVE_EVERY)
        moved = latest is not None and (step_of(latest) or 0) >= wanted
        return self.aim.share * 0.001 if moved else None

    def reached_end(self) -> float | None:
        return self.aim.share * self.pace.end if self.logged_step() >= self.steps else None


def landed(before: State, now: State, steps: int, validation: bool) -> str:
    """Where a kill hit, by what it left: the words of the table in the results."""
    if len(now.starts) == len(before.starts):
        return "start-up"
    new = [
        left.files
        for name, left in now.leftovers.items()
        if UNFINISHED in name and left != before.leftovers.get(name)
    ]
    if new:
        return "save: manifest written" if "manifest.json" in new[0] else "save: files"
    if now.good and now.latest_step != max(now.good):
        return "save: renamed, latest not moved"
    if now.bad or len(now.good) > KEEP or any(DOOMED in name for name in now.leftovers):
        return "save: deleting old ones"
    if now.last == steps:
        return "end"
    validated = {line["step"] for line in now.metrics if line.get("kind") == "val"}
    if validation and now.last and now.last % VAL_EVERY == 0 and now.last not in validated:
        return "validation"
    return "first step" if now.last == now.starts[-1]["resumed_step"] else "steps"
