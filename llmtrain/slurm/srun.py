"""Running a command on the ranks: srun in the background, its time limit, and signals to it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from llmtrain.slurm import cluster

# Below what Linux gives to outgoing connections (32768 and up), which come between probe and use.
FIRST_PORT, PORTS = 20000, 12000
APART = 97  # of the ports that a job tries: jobs that start at once have neighbouring numbers
# What the shell of the job may have of an older life.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Seconds: between ending a step and asking again; before srun can pass on a signal; between two.
GRACE, WARM_UP, AGAIN = 30, 3, 30
POLL = 0.1


class Step:
    """srun of a command with one task a rank; MASTER_ADDR and MASTER_PORT are where they meet.

    reads: gets the lines that the ranks print, instead of this process's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        nodes: Sequence[str],
        tasks_per_node: int,
        options: Sequence[str],
        reads: list[str] | None = None,
    ):
        self.line = [
            "srun",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes) * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}",
            "--distribution=block",
            "--input=none",
            "--export=ALL",
            *options,
        ]
        self.meet = meeting_point(nodes[0])
        environment = {k: v for k, v in os.environ.items() if k not in FOREIGN}
        environment |= {"MASTER_ADDR": self.meet[0], "MASTER_PORT": str(self.meet[1])}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*self.line, *command],
            env=environment,
            start_new_session=True,
            stdout=None if reads is None else subprocess.PIPE,
            text=True,
        )
        self.reading = threading.Thread(target=self.read, args=(reads,), daemon=True)
        self.reading.start()
        self.signalled: float | None = None

    def read(self, reads: list[str] | None) -> None:
        for line in self.process.stdout or ():
            reads.append(line)

    def wait(self, told: Callable[[], bool], limit: float) -> int:
        """srun's exit code. told: called again and again, whether the ranks are to stop; they are
        ended after `limit` seconds."""
        until = self.began + limit
        while self.process.poll() is None:
            now = time.monotonic()
            if told() and now > self.began + WARM_UP:
                self.stop_ranks(now)
            if now > until:
                self.process.terminate()  # srun ends the ranks, with SIGKILL if it has to
                until = now + GRACE
            time.sleep(POLL)
        self.reading.join(timeout=GRACE)
        return self.process.returncode

    def stop_ranks(self, now: float) -> None:
        """USR2, which srun passes on to the ranks; again from time to time, in case a rank was not
        ready for it."""
        if self.signalled is None or now > self.signalled + AGAIN:
            self.process.send_signal(signal.SIGUSR2)
            self.signalled = now


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
        port = FIRST_PORT + (wanted + APART * offset) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return address, port
    raise ValueError(f"driver: no free port near {FIRST_PORT + wanted} on {node}")
