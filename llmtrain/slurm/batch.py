"""The batch driver: the only command of a job, on its first node.

    python -m llmtrain.slurm.batch <submission>

node check -> ranks -> decision (decide.py). It holds no GPU and no torch. Slurm tells it that the
time limit is near (USR2), and it tells the ranks; at preemption, cancellation and the limit itself
Slurm tells the ranks, and this process may not live long enough to see them end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from llmtrain.exits import FAILURE
from llmtrain.slurm import cluster
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.decide import Decision, Ended, decide
from llmtrain.slurm.endings import lost, newest_step, outcome
from llmtrain.slurm.rank import stamp
from llmtrain.slurm.srun import Step
from llmtrain.slurm.submission import BEGAN, Submission, append_line, read_lines
from llmtrain.slurm.verdict import Verdict, judge, read_reports, wishes


def main(arguments: list[str]) -> int:
    submission = Submission.load(arguments[0])
    if submission.points:
        submission = Submission.load(submission.points[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    return Driver(submission).start()


def own_job() -> str:
    """Slurm's name of this job. That of an array's task: the number of its last task is the one of
    the whole array, which a requeue would then take for all."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


class Driver:
    """One start of a job."""

    def __init__(self, submission: Submission):
        self.submission = submission
        self.run_dir = Path(submission.run_dir)
        self.signals: list[int] = []
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self.hear)
        self.job = own_job()
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = cluster.expand(os.environ["SLURM_JOB_NODELIST"])
        lines = read_lines(submission.decisions)
        self.earlier = [line for line in lines if line["job"] == self.job]
        self.first_step = newest_step(self.run_dir)
        self.excluded = {node for line in self.earlier for node in line["exclude"]}
        self.folder = submission.start_folder(self.job, self.restart)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / BEGAN).touch()
        submission.logs.mkdir(exist_ok=True)
        self.log = (submission.logs / "driver.log").open("a", encoding="utf-8", buffering=1)
        # The ranks are to stop; somebody wants the job to end; Slurm ends it, and this is noted.
        self.stopping = self.asked = self.noted = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def say(self, text: str) -> None:
        """To the job's log and, for `llmtrain logs`, to the driver's."""
        now = stamp()
        print(f"{now} driver: {text}", flush=True)
        for line in text.splitlines():
            self.log.write(f"{now} {line}\n")

    def start(self) -> int:
        """Check the nodes, run the ranks, and return the exit code of the job."""
        nodes = " ".join(self.nodes)
        code = self.submission.code_sha256[:12]
        self.say(f"job {self.job}, start {self.restart}, nodes {nodes}, code {code}")
        usable = self.usable()
        if usable is None:
            left = tuple(sorted(self.excluded.intersection(self.nodes)))
            why = f"too few nodes without {', '.join(left)}"
            return self.carry_out(Ended(cause="bad node", why=why, exclude=left))
        ended = self.check(usable) if self.submission.preflight["enabled"] else None
        if ended is None and self.told():
            ended = Ended(cause="stopped", why="told to stop before the training")
        return self.carry_out(ended or self.train(usable))

    def usable(self) -> list[str] | None:
        """The nodes to train on: the largest usable number of those that were not excluded (Slurm
        takes an exclusion only after a requeue, and may be faster). None when there are too few."""
        good = [node for node in self.nodes if node not in self.excluded]
        size = max((size for size in self.submission.sizes if size <= len(good)), default=0)
        if not size:
            return None
        if size < len(self.nodes):
            self.say(f"{size} of {len(self.nodes)} nodes are used: {' '.join(good[:size])}")
        return good[:size]

    def check(self, nodes: list[str]) -> Ended | None:
        """The node check; how this start ends because of it, if it does."""
        wanted = wishes(
            self.submission.preflight,
            gpus=self.submission.gpus,
            nodes=len(nodes),
            run_dir=self.submission.run_dir,
            code=self.submission.code,
        )
        printed: list[str] = []
        probe = ["-m", "llmtrain.slurm.probes", json.dumps(wanted)]
        self.step(nodes, probe, ["--wait=0"], reads=printed, limit=wanted["timeout_seconds"])
        if self.told():
            return Ended(cause="stopped", why="told to stop during the node check")
        verdict = judge(read_reports(printed), nodes, self.submission.tasks_per_node, wanted)
        text = json.dumps(verdict.to_json(), indent=1) + "\n"
        (self.folder / "preflight.json").write_text(text, encoding="utf-8")
        self.say("node check\n" + verdict.table())
        return None if verdict.good else self.failed_check(verdict, nodes)

    def failed_check(self, verdict: Verdict, nodes: list[str]) -> Ended:
        if len(verdict.bad) == len(nodes) > 1:  # then it is not the nodes
            first = f"{nodes[0]}: {verdict.bad[nodes[0]][0]}"
            return Ended(cause="mistake", why=f"every node fails the check; {first}")
        reasons = [f"bad node {node}: {why[0]}" for node, why in verdict.bad.items()]
        why = "; ".join(reasons or [f"node check: {failure}" for failure in verdict.failures])
        return Ended(cause="bad node", why=why, exclude=tuple(verdict.bad))

    def train(self, nodes: list[str]) -> Ended:
        """Run the ranks to their end."""
        config = self.submission.restart_config if self.continues() else self.submission.config
        rank = ["-m", "llmtrain.slurm.rank", self.submission.folder, str(self.folder), str(config)]
        code = self.step(nodes, rank, ["--kill-on-bad-exit=1"])
        ended = outcome(self.submission, self.folder, nodes, code)
        return Ended(**ended)

    def continues(self) -> bool:
        """Whether an earlier start of this job left a checkpoint."""
        latest = self.run_dir / "checkpoints" / "latest"
        first = self.submission.start_folder(self.job, 0)
        return (
            self.restart > 0
            and first.exists()
            and latest.exists()
            and latest.stat().st_mtime > (first / BEGAN).stat().st_mtime
        )

    def step(
        self,
        nodes: list[str],
        arguments: Sequence[str],
        options: Sequence[str],
        *,
        reads: list[str] | None = None,
        limit: float = math.inf,
    ) -> int:
        """srun Python on the ranks; the exit code."""
        step = Step(
            [self.submission.python, *arguments],
            nodes=nodes,
            tasks_per_node=self.submission.tasks_per_node,
            options=[*self.submission.srun, *options],
            reads=reads,
        )
        address, port = step.meet
        self.say(f"{' '.join(step.line)} ({arguments[1]}); the ranks meet at {address}:{port}")
        return step.wait(self.told, limit)

    def told(self) -> bool:
        """Whether the ranks have to be told to stop; takes note of new signals."""
        while self.signals:
            name = signal.Signals(number := self.signals.pop(0)).name
            by_slurm = self.by_slurm()
            if by_slurm not in ("nothing", "preempts"):
                self.ended_by_slurm(name, by_slurm)
                continue
            self.say(f"{name}: the ranks are told to save and stop")
            self.stopping = True
            self.asked |= number == signal.SIGTERM and by_slurm == "nothing"
        return self.stopping

    def ended_by_slurm(self, name: str, by_slurm: str) -> None:
        """Slurm has told the ranks itself; note what it does, while there is time."""
        self.say(f"{name}: Slurm ends this start ({by_slurm}), and tells the ranks")
        if by_slurm == "time limit" or self.noted:
            return  # at the limit it is this process that asks for a requeue, when the ranks ended
        step, gone = newest_step(self.run_dir), lost(self.nodes)
        so_far = f"newest checkpoint of step {step}"
        if gone:
            why = f"lost node {', '.join(gone)}, {so_far}"
        else:
            why = f"the ranks are saving, {so_far} so far"
        cause = "lost" if gone else "stopped"
        ended = self.completed(Ended(cause=cause, why=why), by_slurm)
        self.note(ended, decide(ended, self.earlier, self.submission.max_restarts))
        self.noted = True

    def by_slurm(self) -> str:
        """What Slurm does with this job by itself."""
        try:
            job = cluster.show_job(self.job)
        except SlurmError as error:
            self.say(f"the controller does not answer: {error}")
            return "nothing"
        if job.running:
            return "preempts" if job.preempted else "nothing"
        if job.restarts > self.restart or job.pending:
            return "requeues"
        return "time limit" if job.reason == "TimeLimit" else "ends"

    def completed(self, ended: Ended, by_slurm: str) -> Ended:
        """An ending with what is the same for all."""
        steps = {"first_step": self.first_step, "step": newest_step(self.run_dir)}
        return replace(ended, **steps, asked=self.asked, by_slurm=by_slurm)

    def carry_out(self, ended: Ended) -> int:
        """Decide, note it, and requeue if that is it; returns the exit code of the job."""
        ended = self.completed(ended, self.by_slurm())
        if ended.exclude:
            ended = replace(ended, enough=self.enough_without(ended.exclude))
        decision = decide(ended, self.earlier, self.submission.max_restarts)
        if self.noted and ended.cause != "finished":
            self.say(f"the ranks ended: {ended.why}")
        else:
            self.note(ended, decision)
        if decision.action != "requeue":
            return decision.code
        # A requeue ends this process too; it has a last thing to say.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        excluded = sorted({*self.submission.exclude, *self.excluded, *decision.exclude})
        try:
            cluster.run(["scontrol", "requeue", self.job])
            if excluded:
                change = f"ExcNodeList={','.join(excluded)}"
                cluster.run(["scontrol", "update", f"JobId={self.job}", change])
        except SlurmError as error:
            again = f"submit again: sbatch {self.submission.path / 'job.sbatch'}"
            refused = Decision(action="end", reason=f"{error}; {again}", code=FAILURE)
            self.note(ended, refused)
            return refused.code
        return decision.code

    def enough_without(self, exclude: Sequence[str]) -> bool:
        """Whether the partition has nodes enough besides these and those excluded before."""
        try:
            nodes = cluster.nodes_of(os.environ["SLURM_JOB_PARTITION"])
        except SlurmError as error:
            self.say(f"the controller does not answer: {error}")
            return True
        bad = {*self.submission.exclude, *self.excluded, *exclude}
        return len(set(nodes) - bad) >= min(self.submission.sizes)

    def note(self, ended: Ended, decision: Decision) -> None:
        """Into decisions.jsonl and the job's log."""
        self.say(f"{decision.action}: {decision.reason}")
        line = {
            "time": stamp(),
            "job": self.job,
            "start": self.restart,
            "nodes": self.nodes,
            "cause": ended.cause,
            "advanced": ended.advanced,
            "step": ended.step,
            **decision.to_json(),
        }
        append_line(self.submission.decisions, line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
