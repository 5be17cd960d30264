"""What a job does after its ranks ended: a pure function of how they ended and what came before.

    ranks ended with           the job
    0   finished               done
    2   user's mistake         ends: it would fail again
    85  stopped, saved         is requeued, unless it was cancelled or somebody asked to stop
    86  hung                   is requeued without the nodes that the watchdog named
    lost: a node, a rank       is requeued without that node, unless Slurm was faster
    1   failure                is requeued when checkpoints advanced since the last start
    a bad node in the check    is requeued without it, or ends when too few nodes are left

No restart more than max_restarts times: failures are counted over the whole job, the others as long
as no new checkpoint comes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from llmtrain.exits import FAILURE, FINISHED, HUNG, STOPPED, USAGE_ERROR

Cause = Literal["finished", "mistake", "stopped", "hung", "lost", "failure", "bad node"]
CAUSES: dict[int, Cause] = {
    FINISHED: "finished",
    USAGE_ERROR: "mistake",
    STOPPED: "stopped",
    HUNG: "hung",
}
# What counts towards max_restarts only until a new checkpoint comes.
FORGIVEN = ("stopped", "hung", "lost", "bad node")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a start ended. first_step, step: of the newest checkpoint before and after it. exclude:
    nodes that should not be used again; enough: whether the others can do. asked: somebody asked
    the job, by hand, to stop. by_slurm: what Slurm does with the job meanwhile."""

    cause: Cause
    why: str
    first_step: int | None = None
    step: int | None = None
    exclude: tuple[str, ...] = ()
    enough: bool = True
    asked: bool = False
    by_slurm: Literal["nothing", "preempts", "requeues", "ends", "time limit"] = "nothing"

    @property
    def advanced(self) -> bool:
        return self.step is not None and (self.first_step is None or self.step > self.first_step)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """requeue: this job asks Slurm for it; wait: Slurm does it by itself. code: of the job."""

    action: Literal["done", "requeue", "wait", "end"]
    reason: str
    exclude: tuple[str, ...] = ()
    code: int = FINISHED

    def to_json(self) -> dict:
        return {**asdict(self), "exclude": list(self.exclude)}


def decide(ended: Ended, earlier: list[dict], max_restarts: int) -> Decision:
    """earlier: the lines of decisions.jsonl of this job, oldest first."""
    if ended.cause == "finished":
        return Decision(action="done", reason="finished")
    if ended.by_slurm == "requeues":
        return Decision(action="wait", reason=f"Slurm requeues the job; {ended.why}")
    if ended.by_slurm == "ends":
        return Decision(action="end", reason=f"the job was cancelled; {ended.why}", code=STOPPED)
    if ended.cause == "mistake":
        return Decision(action="end", reason=f"not requeued: {ended.why}", code=USAGE_ERROR)
    if ended.cause == "stopped" and ended.asked:
        return Decision(action="end", reason=f"stopped by hand; {ended.why}", code=STOPPED)
    exclude = ended.exclude
    if exclude and not ended.enough:
        if ended.cause == "bad node":
            reason = f"not requeued: {ended.why}; too few nodes of the partition are left"
            return Decision(action="end", reason=reason, exclude=exclude, code=FAILURE)
        exclude = ()  # the check of the next start looks at them again
    done = restarts(earlier, ended)
    progress = "" if ended.advanced or ended.cause == "bad node" else ", no new checkpoint"
    if ended.cause == "failure" and not ended.advanced:
        reason = f"not requeued: {ended.why}{progress}"
        return Decision(action="end", reason=reason, code=FAILURE)
    if done >= max_restarts:
        kind = "after failures" if ended.cause == "failure" else "without a new checkpoint"
        reason = (
            f"not requeued: {ended.why}; {done} restarts {kind} are max_restarts={max_restarts}"
        )
        return Decision(action="end", reason=reason, exclude=exclude, code=FAILURE)
    without = f", without {', '.join(exclude)}" if exclude else ""
    reason = f"requeued{without}: {ended.why}{progress}"
    return Decision(action="requeue", reason=reason, exclude=exclude)


def restarts(earlier: list[dict], ended: Ended) -> int:
    """How many restarts count against this one."""
    requeued = [line for line in earlier if line["action"] == "requeue"]
    if ended.cause == "failure":
        return sum(line["cause"] == "failure" for line in requeued)
    if ended.advanced:
        return 0
    count = 0
    for line in reversed(requeued):
        if line["cause"] in FORGIVEN:
            count += 1
        if line["advanced"]:
            break
    return count
