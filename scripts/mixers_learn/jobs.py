"""Worker processes: several at once, each restarted once in a safer mode, logs in files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "kernels", "data_prep", "eval")


@dataclass
class Job:
    """command: the worker's; retry: the one to try after a failure, None for none."""

    name: str
    command: list[str]
    retry: list[str] | None
    process: subprocess.Popen | None = field(default=None, repr=False)
    began: float = 0.0


def environment() -> dict[str, str]:
    """The checkout's packages first; no thread pools that fight over cores."""
    paths = [str(ROOT / package) for package in PACKAGES]
    paths += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    extra = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ, **extra}


def start(job: Job, log: Path) -> None:
    with log.open("ab") as file:
        job.process = subprocess.Popen(
            job.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,  # a group of its own, so that its children end with it
        )
    job.began = time.perf_counter()


def stop(job: Job, grace: float = 20.0) -> None:
    """End a worker and its children; training saves a checkpoint on SIGTERM."""
    os.killpg(job.process.pid, signal.SIGTERM)
    try:
        job.process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def run(jobs: list[Job], *, at_once: int, logs: Path, deadline: float | None) -> list[str]:
    """Run all jobs, in this order, some at once. deadline: seconds after which what still runs is
    stopped and nothing more is started. Returns the names of jobs that did not finish."""
    logs.mkdir(parents=True, exist_ok=True)
    began, waiting, running, failed = time.perf_counter(), list(jobs), [], []
    while waiting or running:
        if deadline is not None and time.perf_counter() - began > deadline:
            for job in running:
                stop(job)
            names = [job.name for job in (*running, *waiting)]
            print(f"deadline: not finished: {', '.join(names)}", file=sys.stderr, flush=True)
            return [*failed, *names]
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            start(job, logs / f"{job.name}.log")
            running.append(job)
            print(f"{time.perf_counter() - began:6.0f} s  started   {job.name}", flush=True)
        for job in list(running):
            code = job.process.poll()
            if code is None:
                continue
            running.remove(job)
            took = f"{time.perf_counter() - began:6.0f} s  "
            if code == 0:
                print(f"{took}finished  {job.name}", flush=True)
            elif job.retry is not None:
                print(f"{took}failed    {job.name} (exit {code}), again in the safe mode")
                waiting.insert(0, Job(job.name, job.retry, None))
            else:
                print(f"{took}failed    {job.name} (exit {code}), see its log", flush=True)
                failed.append(job.name)
        time.sleep(0.1)
    return failed
