"""The batch driver: the only command of a job, on its first node.

    python -m llmtrain.slurm.batch <submission>

node check -> ranks -> decision (decide.py). It holds no GPU and no torch. Slurm tells it that the
time limit is near (USR2), and it tells the ranks; at preemption, cancellation and the limit itself
Slurm tells the ranks, and this process may not live long enough to see them end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from llmtrain.exits import FAILURE
from llmtrain.slurm import cluster
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.decide import CAUSES, Decision, Ended, decide
from llmtrain.slurm.rank import describe, stamp
from llmtrain.slurm.submission import Submission, append_line, read_lines

STEP_NAME = re.compile(r"step-(\d{8,})")
FIRST_PORT, PORTS = 20000, 20000
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
        self.asked = False
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
        return self.carry_out(self.train(nodes))

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
        code = self.step(nodes, [self.submission.python, *rank], self.submission.srun)
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

    def step(self, nodes: list[str], command: Sequence[str], options: Sequence[str]) -> int:
        """srun a command with one task a rank; USR2 goes to all of them. Returns srun's code."""
        tasks = self.submission.tasks_per_node
        srun = [
            "srun",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes) * tasks}",
            f"--ntasks-per-node={tasks}",
            "--distribution=block",
            "--kill-on-bad-exit=1",
            "--input=none",
            *options,
        ]
        address = meeting_point(nodes[0])
        say(f"{' '.join(srun)} ...; the ranks meet at {address[0]}:{address[1]}")
        environment = os.environ | {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        process = subprocess.Popen([*srun, *command], env=environment, start_new_session=True)
        passed_on = 0
        while process.poll() is None:
            if passed_on < len(self.told):
                self.pass_on(process, self.told[passed_on])
                passed_on += 1
            time.sleep(0.1)
        return process.returncode

    def pass_on(self, process: subprocess.Popen, number: int) -> None:
        """A signal to this process, as USR2 to the ranks, unless Slurm has told them itself."""
        name = signal.Signals(number).name
        if number == signal.SIGTERM:
            if self.by_slurm() != "nothing":
                say(f"{name}: Slurm ends this start, and tells the ranks")
                return
            self.asked = True
        say(f"{name}: the ranks are told to save and stop")
        process.send_signal(signal.SIGUSR2)

    def by_slurm(self) -> str:
        """What Slurm does with this job by itself."""
        try:
            job = cluster.show_job(self.job)
        except SlurmError as error:
            say(f"the controller does not answer: {error}")
            return "nothing"
        if job.running:
            return "nothing"
        if job.restarts > self.restart:
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
                return {"cause": cause, "why": words(of_it[0])}
        if all(CAUSES.get(record["code"]) == "stopped" for record in failed):
            step = newest_step(Path(self.submission.run_dir))
            return {"cause": "stopped", "why": f"stopped on a signal, checkpoint of step {step}"}
        first = next(record for record in failed if CAUSES.get(record["code"]) != "stopped")
        return {"cause": "lost" if first["code"] < 0 else "failure", "why": words(first)}

    def carry_out(self, ended: Ended) -> int:
        """Decide, note it, and requeue if that is it; returns the exit code of the job."""
        decision = decide(ended, self.earlier, self.submission.max_restarts)
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
