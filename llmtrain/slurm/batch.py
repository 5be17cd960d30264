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
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from llmtrain.exits import FAILURE
from llmtrain.slurm import cluster
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.decide import CAUSES, Decision, Ended, decide
from llmtrain.slurm.rank import describe, stamp
from llmtrain.slurm.submission import Submission, append_line, read_lines
from llmtrain.slurm.verdict import judge, read_reports, wishes

STEP_NAME = re.compile(r"step-(\d{8,})")
# Of a watchdog's verdict: ranks that gave no report, or stand where the others do not wait.
GUILTY = re.compile(r"(?m)^(?:silent|lags) +rank (\d+)")
FIRST_PORT, PORTS = 20000, 20000
# Seconds between ending a step and killing it.
GRACE = 30
# States of nodes that have gone, as sinfo and scontrol write them.
GONE = ("DOWN", "NOT_RESPONDING", "FAIL")


def main(arguments: list[str]) -> int:
    return Driver(Submission.load(arguments[0])).start()


def say(text: str) -> None:
    print(f"{stamp()} driver: {text}", flush=True)


class Driver:
    """One start of a job."""

    def __init__(self, submission: Submission):
        self.submission = submission
        self.job = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = cluster.expand(os.environ["SLURM_JOB_NODELIST"])
        lines = read_lines(submission.decisions)
        self.earlier = [line for line in lines if line["job"] == self.job]
        self.excluded = {node for line in self.earlier for node in line["exclude"]}
        self.folder = submission.start_folder(self.restart)
        self.told: list[int] = []
        self.asked = self.noted = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.told.append(number)

    def start(self) -> int:
        """Run the ranks, and return the exit code of the job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        say(
            f"job {self.job}, start {self.restart}, nodes {' '.join(self.nodes)}, code "
            f"{self.submission.code_sha256[:12]}"
        )
        nodes = self.usable()
        if nodes is None:
            left = [node for node in self.nodes if node in self.excluded]
            why = f"too few nodes without {', '.join(left)}"
            return self.carry_out(Ended(cause="bad node", why=why, exclude=tuple(sorted(left))))
        ended = self.check(nodes) if self.submission.preflight["enabled"] else None
        return self.carry_out(ended or self.train(nodes))

    def check(self, nodes: list[str]) -> Ended | None:
        """The node check; how this start ends because of it, if it does."""
        wanted = wishes(
            self.submission.preflight,
            gpus=self.submission.gpus,
            nodes=len(nodes),
            run_dir=self.submission.run_dir,
            code=self.submission.code,
        )
        probe = [self.submission.python, "-m", "llmtrain.slurm.probes", json.dumps(wanted)]
        output: list[str] = []
        options = [*self.submission.srun, "--wait=0"]
        self.step(nodes, probe, options, output, limit=wanted["timeout_seconds"])
        state = {"by_slurm": self.by_slurm(), "asked": self.asked}
        if self.told:
            why = "told to stop during the node check"
            return Ended(cause="stopped", why=why, **state)
        verdict = judge(read_reports(output), nodes, self.submission.tasks_per_node, wanted)
        text = json.dumps(verdict.to_json(), indent=1) + "\n"
        (self.folder / "preflight.json").write_text(text, encoding="utf-8")
        say("node check\n" + verdict.table())
        if verdict.good:
            return None
        if len(verdict.bad) == len(nodes) > 1:
            why = f"every node fails the check; {nodes[0]}: {verdict.bad[nodes[0]][0]}"
            return Ended(cause="mistake", why=why, **state)
        if not verdict.bad:
            why = f"node check: {'; '.join(verdict.failures)}"
            return Ended(cause="bad node", why=why, **state)
        why = "; ".join(f"bad node {node}: {why[0]}" for node, why in verdict.bad.items())
        return Ended(cause="bad node", why=why, exclude=tuple(verdict.bad), **state)

    def usable(self) -> list[str] | None:
        """The nodes to train on: the largest usable number of those that were not excluded (Slurm
        takes an exclusion only after a requeue, and may be faster). None when there are too few."""
        good = [node for node in self.nodes if node not in self.excluded]
        size = max((size for size in self.submission.sizes if size <= len(good)), default=0)
        if not size:
            return None
        if size < len(self.nodes):
            say(f"{size} of {len(self.nodes)} nodes are used: {' '.join(good[:size])}")
        return good[:size]

    def train(self, nodes: list[str]) -> Ended:
        """Run the ranks to their end."""
        first_step = newest_step(Path(self.submission.run_dir))
        config = self.submission.restart_config if self.continues() else self.submission.config
        rank = ["-m", "llmtrain.slurm.rank", self.submission.folder, str(self.folder), str(config)]
        options = [*self.submission.srun, "--kill-on-bad-exit=1"]
        code = self.step(nodes, [self.submission.python, *rank], options)
        ended = self.outcome(nodes, code)
        return Ended(
            **ended,
            first_step=first_step,
            step=newest_step(Path(self.submission.run_dir)),
            asked=self.asked,
            by_slurm=self.by_slurm(),
        )

    def continues(self) -> bool:
        """Whether an earlier start of this job left a checkpoint."""
        latest = Path(self.submission.run_dir) / "checkpoints" / "latest"
        began = (self.submission.start_folder(0)).stat().st_ctime
        return self.restart > 0 and latest.exists() and latest.stat().st_mtime > began

    def step(
        self,
        nodes: list[str],
        command: Sequence[str],
        options: Sequence[str],
        output: list[str] | None = None,
        limit: float = math.inf,
    ) -> int:
        """srun a command with one task a rank; USR2 goes to all of them. Returns srun's code.

        output: gets the lines that the ranks print, instead of the log. limit: seconds until the
        ranks are ended.
        """
        tasks = self.submission.tasks_per_node
        srun = [
            "srun",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes) * tasks}",
            f"--ntasks-per-node={tasks}",
            "--distribution=block",
            "--input=none",
            *options,
        ]
        address = meeting_point(nodes[0])
        say(f"{' '.join(srun)} ...; the ranks meet at {address[0]}:{address[1]}")
        environment = os.environ | {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        process = subprocess.Popen(
            [*srun, *command],
            env=environment,
            start_new_session=True,
            stdout=None if output is None else subprocess.PIPE,
            text=True,
        )
        reading = threading.Thread(target=read, args=(process, output), daemon=True)
        reading.start()
        passed_on, until = 0, time.monotonic() + limit
        while process.poll() is None:
            if passed_on < len(self.told):
                self.pass_on(process, self.told[passed_on])
                passed_on += 1
            if time.monotonic() > until:
                say(f"the ranks did not end within {limit:.0f} s and are killed")
                process.terminate()  # srun then ends them
                until += GRACE
            time.sleep(0.1)
        reading.join(timeout=GRACE)
        return process.returncode

    def pass_on(self, process: subprocess.Popen, number: int) -> None:
        """A signal to this process, as USR2 to the ranks, unless Slurm has told them itself."""
        name = signal.Signals(number).name
        if number == signal.SIGTERM:
            if self.by_slurm() != "nothing":
                self.ended_by_slurm(name)
                return
            self.asked = True
        say(f"{name}: the ranks are told to save and stop")
        process.send_signal(signal.SIGUSR2)

    def ended_by_slurm(self, name: str) -> None:
        """Note what Slurm does now: this process may not see the ranks end."""
        say(f"{name}: Slurm ends this start, and tells the ranks")
        by_slurm = self.by_slurm()
        if by_slurm == "time limit":
            return  # the requeue is for this process to ask for, as soon as the ranks have ended
        step = newest_step(Path(self.submission.run_dir))
        why = f"the ranks are saving, checkpoint of step {step} so far"
        ended = Ended(cause="stopped", why=why, step=step, by_slurm=by_slurm)
        self.note(ended, decide(ended, self.earlier, self.submission.max_restarts))
        self.noted = True

    def by_slurm(self) -> str:
        """What Slurm does with this job by itself."""
        try:
            job = cluster.show_job(self.job)
        except SlurmError as error:
            say(f"the controller does not answer: {error}")
            return "nothing"
        if job.running:
            return "nothing"
        if job.restarts > self.restart or job.state == "PENDING":
            return "requeues"
        return "time limit" if job.reason == "TimeLimit" else "ends"

    def outcome(self, nodes: list[str], code: int) -> dict:
        """Cause, reason and nodes to exclude, of how the ranks ended."""
        gone = [node for node in nodes if node_state(node).intersection(GONE)]
        if gone:
            return {"cause": "lost", "why": f"lost node {', '.join(gone)}", "exclude": tuple(gone)}
        files = self.folder.glob("rank-*.json")
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        records.sort(key=lambda record: record["time"])
        failed = [record for record in records if CAUSES.get(record["code"]) != "finished"]
        ranks = len(nodes) * self.submission.tasks_per_node
        if not failed and len(records) == ranks and code == 0:
            return {"cause": "finished", "why": "finished"}
        if not failed:
            silent = sorted(set(range(ranks)) - {record["rank"] for record in records})
            shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            return {"cause": "lost", "why": f"ranks {shown} were killed (srun: exit code {code})"}
        for cause in ("mistake", "hung"):  # other ranks may end earlier, and in other ways
            of_it = [record for record in failed if CAUSES.get(record["code"]) == cause]
            if of_it:
                named = self.named_by_watchdog(nodes) if cause == "hung" else ()
                return {"cause": cause, "why": words(of_it[0]), "exclude": named}
        if all(CAUSES.get(record["code"]) == "stopped" for record in failed):
            step = newest_step(Path(self.submission.run_dir))
            return {"cause": "stopped", "why": f"stopped on a signal, checkpoint of step {step}"}
        first = next(record for record in failed if CAUSES.get(record["code"]) != "stopped")
        return {"cause": "lost" if first["code"] < 0 else "failure", "why": words(first)}

    def named_by_watchdog(self, nodes: list[str]) -> tuple[str, ...]:
        """The nodes of the ranks that held the others up, unless these are all nodes."""
        began = self.folder.stat().st_ctime
        files = sorted((Path(self.submission.run_dir) / "hangs").glob("*/verdict.txt"))
        if not files or files[-1].stat().st_mtime < began:
            return ()
        ranks = GUILTY.findall(files[-1].read_text(encoding="utf-8"))
        named = {nodes[int(rank) // self.submission.tasks_per_node] for rank in ranks}
        return tuple(sorted(named)) if len(named) < len(nodes) else ()

    def carry_out(self, ended: Ended) -> int:
        """Decide, note it, and requeue if that is it; returns the exit code of the job."""
        if ended.exclude:
            ended = replace(ended, enough=self.enough_without(ended.exclude))
        decision = decide(ended, self.earlier, self.submission.max_restarts)
        if self.noted and ended.cause != "finished":
            say(f"the ranks ended: {ended.why}")
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
            refused = Decision(
                action="end",
                reason=f"{error}; submit again: sbatch {self.submission.path / 'job.sbatch'}",
                code=FAILURE,
            )
            self.note(ended, refused)
            return refused.code
        return decision.code

    def enough_without(self, exclude: Sequence[str]) -> bool:
        """Whether the partition has nodes enough besides these and those excluded before."""
        try:
            nodes = cluster.nodes_of(os.environ["SLURM_JOB_PARTITION"])
        except SlurmError as error:
            say(f"the controller does not answer: {error}")
            return True
        bad = {*self.submission.exclude, *self.excluded, *exclude}
        return len(set(nodes) - bad) >= min(self.submission.sizes)

    def note(self, ended: Ended, decision: Decision) -> None:
        """Into decisions.jsonl and the job's log."""
        say(f"{decision.action}: {decision.reason}")
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


def read(process: subprocess.Popen, output: list[str] | None) -> None:
    """Lines of a process, as they come."""
    for line in process.stdout or ():
        output.append(line)


def words(record: dict) -> str:
    ended = describe(record["code"])
    said = f": {record['said']}" if record["said"] else ""
    return f"rank {record['rank']} on {record['node']} ended with {ended}{said}"


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest finished checkpoint, good or not."""
    found = (STEP_NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(match.group(1)) for match in found if match), default=None)


def node_state(node: str) -> set[str]:
    """The words of a node's state: {"IDLE", "DRAIN"}; empty when the controller does not answer."""
    try:
        text = cluster.run(["scontrol", "--oneliner", "show", "node", node])
    except SlurmError:
        return set()
    match = re.search(r"\bState=(\S+)", text)
    return set() if match is None else set(re.split(r"[+*]", match.group(1)))


def meeting_point(node: str) -> tuple[str, int]:
    """Where the ranks find each other: the address of the first node and a port that is free."""
    address = os.environ.get("MASTER_ADDR") or node
    try:
        socket.getaddrinfo(address, None)
    except socket.gaierror:  # a name that only Slurm knows
        text = cluster.run(["scontrol", "--oneliner", "show", "node", node])
        match = re.search(r"\bNodeAddr=(\S+)", text)
        address = match.group(1) if match else address
    wanted = int(os.environ["SLURM_JOB_ID"]) % PORTS
    for offset in range(100):
        port = FIRST_PORT + (wanted + offset) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return address, port
    raise ValueError(f"driver: no free port near {FIRST_PORT + wanted} on {node}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
