"""The processes of a job: `llmtrain train` on every rank, each of which can be killed alone.

fork: ranks are forked from this process, which has imported torch, DeepSpeed and llmtrain, and run
the same llmtrain.cli.main as the command does; a start costs a second instead of ten.
exec: `python -m llmtrain.cli` as a new program.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "kernels", "data_prep", "eval")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1
# What DeepSpeed imports only when it builds an optimizer: seconds.
LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.parameter_offload")


def preload(device: str) -> None:
    """Import what a training imports, and start nothing: processes forked later begin ready."""
    import torch

    import llmtrain
    from llmtrain.train.engine import load_deepspeed

    load_deepspeed(torch.device(device))
    modules = [info.name for info in pkgutil.walk_packages(llmtrain.__path__, "llmtrain.")]
    for module in (*modules, "deepspeed.runtime.zero.utils", *LATE):
        if not module.startswith("llmtrain.configs"):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the collections of forked processes would copy all of it
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"soak: {threads} threads after the imports: not safe to fork")


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Forked:
    """A process that runs a function, as far as its user sees a subprocess.Popen."""

    def __init__(self, work: Callable[[], int], log: Path | None = None):
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.live(work, log)

    def live(self, work: Callable[[], int], log: Path | None) -> None:
        """All of the child's life; the end is a program's: threads, then exit functions."""
        code = 1
        try:
            die_with_parent()
            if log is not None:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
            try:
                code = work()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


def become_a_rank() -> None:
    """Ends with the supervisor, and leaves it the processor when it wants to kill."""
    die_with_parent()
    os.nice(2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_environment(environment: dict[str, str]) -> dict[str, str]:
    """For a new program: the checkout's packages, no thread pools that fight over cores."""
    inherited = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    path = os.pathsep.join(str(ROOT / package) for package in PACKAGES)
    return {"OMP_NUM_THREADS": "1", **inherited, "PYTHONPATH": path, **environment}


def begin(argv: list[str], environment: dict[str, str], log: Path, how: str):
    """Start `llmtrain <argv>`; how: fork or exec."""
    if how == "exec":
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "llmtrain.cli", *argv],
                env=command_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=become_a_rank,
            )

    def work() -> int:
        from llmtrain import cli

        become_a_rank()
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
        sys.argv = ["llmtrain", *argv]
        return cli.main(argv)

    return Forked(work, log)


class Job:
    """The ranks of one start. log_stem: their output goes to <log_stem>-rank-<r>.log."""

    def __init__(self, argv: list[str], ranks: int, log_stem: Path, how: str):
        port = str(free_port())
        self.began = time.monotonic()
        self.logs = [Path(f"{log_stem}-rank-{rank}.log") for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            self.processes.append(begin(argv, environment, log, how))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def codes(self) -> list[int | None]:
        """Exit codes by rank; None: still running."""
        return [process.poll() for process in self.processes]

    def running(self) -> bool:
        return None in self.codes()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL, at once."""
        for rank in ranks:
            if self.processes[rank].poll() is None:
                os.kill(self.processes[rank].pid, signal.SIGKILL)

    def outlive(self, limit: float, killed: tuple[int, ...] = ()) -> dict[int, dict]:
        """Wait until the ranks that still run end by themselves, at most `limit` seconds, then kill
        them. rank -> {"seconds", "code"} of those not `killed`; code None: it did not end."""
        began = time.monotonic()
        ends: dict[int, dict] = {}
        codes = self.codes()
        alive = [r for r, code in enumerate(codes) if code is None and r not in killed]
        while alive and time.monotonic() - began < limit:
            time.sleep(0.005)
            for rank in list(alive):
                code = self.processes[rank].poll()
                if code is not None:
                    ends[rank] = {"seconds": round(time.monotonic() - began, 2), "code": code}
                    alive.remove(rank)
        self.kill(alive)
        for rank in alive:
            ends[rank] = {"seconds": round(time.monotonic() - began, 2), "code": None}
        self.wait()
        return ends

    def wait(self, limit: float = 60.0) -> None:
        """Until all have ended; only after a kill."""
        began = time.monotonic()
        while self.running():
            if time.monotonic() - began > limit:
                raise RuntimeError(f"soak: processes {self.pids} do not end after SIGKILL")
            time.sleep(0.002)

    def tail(self, lines: int = 12) -> str:
        """The last lines of every rank's output."""
        parts = []
        for log in self.logs:
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            parts.append(f"--- {log.name}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts)
