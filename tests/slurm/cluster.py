"""A real Slurm for tests: munged, slurmctld and three slurmd on this machine, in one folder.

    cluster = Cluster.start()      # ... cluster.submit(...), cluster.wait_for(...) ...
    cluster.stop()

Needs the programs of Slurm and munge, not systemd, cgroups or a configuration in /etc. Everything
lives in a folder of its own under the machine's temporary folder; ports are chosen at the start, so
several clusters do not meet. A cluster whose process was killed is removed by the next start.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

TEMPLATE = Path(__file__).with_name("mini-slurm.conf.in")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2", "n3")
INSTALL = "on Debian, as root: apt-get install slurm-wlm munge"
# munge's socket has to have a short path, so the folder is not below pytest's.
PREFIX = "llmtrain-slurm-"
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
# Daemons are installed where an ordinary user's PATH may not look.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])


def missing() -> list[str]:
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Three nodes, partitions `low` (its jobs are preempted and requeued) and `high`."""

    def __init__(self, folder: Path, lock: TextIO):
        self.folder, self.lock = folder, lock
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        self.full: set[str] = set()
        self.environ = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    @classmethod
    def start(cls) -> Cluster:
        """A cluster whose nodes are idle; RuntimeError, with the logs, when it does not come up."""
        remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        folder.chmod(0o755)
        cluster = cls(folder, new_lock(folder))
        try:
            cluster.start_daemons()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def start_daemons(self) -> None:
        for name in ("log", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        self.write_conf()
        self.start_munged()
        self.daemon("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.until(lambda: set(self.node_states().values()) == {"IDLE"}, 60, "idle nodes")

    def write_conf(self) -> None:
        ports = free_ports(1 + len(NODES))
        words = {
            "HOST": socket.gethostname().partition(".")[0],
            "USER": getpass.getuser(),
            "FOLDER": str(self.folder),
            "FIRST_JOB": str(random.randrange(1000, 1_000_000)),
            **{f"PORT{i}": str(port) for i, port in enumerate(ports)},
        }
        text = TEMPLATE.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        self.conf.write_text(text, encoding="utf-8")

    def start_munged(self) -> None:
        files = {
            "socket": "munge.sock",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
            "log-file": "log/munged.log",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self.daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self.until((self.folder / "munge.sock").exists, 20, "munged's socket")

    def daemon(
        self, name: str, *command: str, file_bytes: int = resource.RLIM_INFINITY, **environ: str
    ) -> None:
        """Start a program in the foreground, in a session of its own, with a log and a pid file.
        file_bytes: what its files can hold."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        with (self.folder / "log" / f"{name}.out").open("a") as out:
            self.daemons[name] = subprocess.Popen(
                command,
                env={**self.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=limit,
            )
        pids = self.folder / "pids"
        pids.mkdir(exist_ok=True)
        (pids / name).write_text(f"{self.daemons[name].pid}\n")

    # Nodes

    def start_node(self, node: str, file_bytes: int = resource.RLIM_INFINITY) -> None:
        command = ("slurmd", "-D", "-N", node, "-f", str(self.conf))
        # Its job steps' own processes inherit this; Slurm sets it for what they start.
        name = f"slurmd-{node}"
        self.daemon(name, *command, file_bytes=file_bytes, SLURMD_NODENAME=node)
        self.full.discard(node)

    def fill_disk(self, node: str) -> None:
        """Files that jobs write on this node cannot grow beyond 8 MiB, as if its disk were full."""
        self.kill_node(node)
        self.start_node(node, file_bytes=8 << 20)
        self.full.add(node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: its slurmd and everything that runs there is gone at once."""
        self.kill_daemon(f"slurmd-{node}")
        kill_processes(self.conf, node)

    def revive_node(self, node: str) -> None:
        """Power on again; returns once Slurm gives it jobs."""
        self.start_node(node)
        self.until(
            lambda: self.node_states()[node] in ("IDLE", "MIXED", "ALLOCATED"), 60, f"{node} back"
        )

    def node_states(self) -> dict[str, str]:
        """{"n1": "IDLE", ...}, as Slurm shows them; nothing while it does not answer."""
        rows = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", ok=None).split("\n")
        pairs = (row.split() for row in rows if len(row.split()) == 2)
        return {node: state.upper() for node, state in pairs}

    # Jobs

    def run(self, *command: str, ok: bool | None = True, cwd: Path | None = None) -> str:
        """A command of Slurm's, or one that calls them; its output. ok=None: however it ends."""
        done = subprocess.run(
            command,
            env=self.environ,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        output = done.stdout + done.stderr
        assert ok is None or (done.returncode == 0) == ok, f"{command}: {output}"
        return output if ok is False else done.stdout

    def submit(self, *arguments: str, script: str) -> int:
        """sbatch of a script given as text; the job's id."""
        path = Path(tempfile.mkstemp(suffix=".sbatch", dir=self.folder)[1])
        path.write_text(script)
        output = f"--output={self.folder}/log/job-%j.out"
        printed = self.run("sbatch", "--parsable", output, *arguments, str(path))
        return int(printed.strip().partition(";")[0])

    def preempt(self, nodes: int = len(NODES), seconds: float = 1) -> int:
        """A job in `high` that takes that many nodes for that long; jobs of `low` make room."""
        return self.submit(
            "-p", "high", f"-N{nodes}", "--exclusive", script=f"#!/bin/sh\nsleep {seconds}\n"
        )

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says about a job: {"JobState": "RUNNING", "Restarts": "0", ...}."""
        line = self.run("scontrol", "show", "job", "-o", str(job))
        return dict(word.partition("=")[::2] for word in line.split() if "=" in word)

    def jobs(self) -> list[int]:
        """All jobs that Slurm remembers, the finished ones included."""
        return sorted(
            {int(job) for job in self.run("squeue", "-h", "-t", "all", "-o", "%A").split()}
        )

    def wait_for(
        self, job: int | str, *states: str, restarts: int = 0, timeout: float = 90
    ) -> dict:
        """The job, once it is in one of the states (any final one, if none is named) and was
        requeued that often. AssertionError when it ended in another one."""
        states = states or DONE
        seen: dict[str, str] = {}

        def arrived() -> bool:
            seen.update(self.job(job))
            state = seen["JobState"]
            if state in states and int(seen["Restarts"]) >= restarts:
                return True
            assert state not in DONE, f"job {job} ended {state}: {seen}\n{self.output(job)}"
            return False

        self.until(arrived, timeout, f"job {job} {states}, requeued {restarts} times")
        return seen

    def output(self, job: int | str) -> str:
        """What the job's batch script printed, as far as it is there."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, true: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} after {timeout} s\n{self.report()}")
            time.sleep(0.2)

    def report(self) -> str:
        """Queue, nodes and the ends of the logs, for a failure's message."""
        parts = [self.run("squeue", "-t", "all", ok=None), self.run("sinfo", "-N", "-l", ok=None)]
        logs = [path for path in (self.folder / "log").iterdir() if path.suffix == ".log"]
        outputs = {Path(self.job(job)["StdOut"]) for job in self.jobs()}
        for path in sorted(logs) + sorted(path for path in outputs if path.exists()):
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if "pmix" not in line]  # never installed, never needed
            parts.append("\n".join([f"== {path}", *kept[-60:]]))
        return "\n".join(parts)

    # The end

    def clear(self) -> None:
        """Cancel all jobs, revive all nodes: as after the start, but for the remembered jobs."""
        self.run("scancel", "-u", getpass.getuser(), ok=None)
        for node in NODES:
            if node in self.full:
                self.kill_node(node)
            if self.daemons[f"slurmd-{node}"].poll() is not None:
                self.start_node(node)
        down = [node for node, state in self.node_states().items() if state.startswith("DRAIN")]
        for node in down:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        self.until(lambda: set(self.node_states().values()) == {"IDLE"}, 90, "idle nodes")

    def kill_daemon(self, name: str) -> None:
        process = self.daemons[name]
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Kill daemons and jobs, remove the folder."""
        for process in self.daemons.values():
            process.kill()
            process.wait()
        remove(self.folder)
        self.lock.close()


def new_lock(folder: Path) -> TextIO:
    """The folder's lock, held until it is closed or this process ends."""
    lock = (folder / "lock.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "lock.new").rename(folder / "lock")  # nobody sees it unlocked
    return lock


def remove_abandoned() -> list[Path]:
    """Kill and remove the clusters whose process is gone without stopping them; returns them."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with ExitStack() as stack:
            try:
                lock = stack.enter_context((folder / "lock").open("r+"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, FileNotFoundError, PermissionError):
                continue  # at work, coming up, or another user's
            for file in sorted((folder / "pids").glob("*")):
                pid = int(file.read_text())
                if str(folder) in environ_of(pid):
                    kill(pid)
            remove(folder)
            removed.append(folder)
    return removed


def remove(folder: Path) -> None:
    """What still runs in a cluster whose daemons are dead, and its files."""
    kill_processes(folder / "slurm.conf", None)
    shutil.rmtree(folder, ignore_errors=True)


def kill_processes(conf: Path, node: str | None) -> None:
    """Kill what runs on a node of the cluster, None: on all of them."""
    deadline = time.monotonic() + 10
    while found := processes_of(conf, node):  # again: one may have started another meanwhile
        if time.monotonic() > deadline:
            raise RuntimeError(f"cluster {conf.parent}: processes {found} outlived their kill")
        for pid in found:
            kill(pid)
        time.sleep(0.05)


def processes_of(conf: Path, node: str | None) -> list[int]:
    """The processes that Slurm started on a node of the cluster, slurmstepd included."""
    wanted = f"\0SLURMD_NODENAME={node}\0" if node else "\0SLURMD_NODENAME="
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            environ = environ_of(int(entry.name))
            if f"\0SLURM_CONF={conf}\0" in environ and wanted in environ:
                found.append(int(entry.name))
    return found


def environ_of(pid: int) -> str:
    """A process's environment as "\\0A=1\\0B=2\\0"; empty for one that is gone or not ours."""
    try:
        return "\0" + Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
