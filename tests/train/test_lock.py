"""A run folder belongs to one job at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtrain.distributed import World
from llmtrain.train.lock import RunLock
from llmtrain.train.loop import train
from llmtrain.train.processes import Identity

ALONE = World(rank=0, size=1, local_rank=0)
ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from llmtrain.distributed import World
from llmtrain.train.lock import RunLock
with RunLock(Path(sys.argv[1]), World(rank=0, size=1, local_rank=0), heartbeat=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """hold(heartbeat=30) -> a process that holds the lock of tmp_path."""
    started = []

    def start(heartbeat: float = 30.0, **environment: str) -> subprocess.Popen:
        path = os.pathsep.join(str(ROOT / package) for package in ("", "kernels", "data_prep"))
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), str(heartbeat)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def write_holder(run_dir: Path, **fields: object) -> dict:
    """A lock file as a process of another machine leaves it."""
    holder = {
        **Identity.own().as_dict(),
        "host": "elsewhere",
        "boot": "another kernel",
        "pid": 77,
        "job": None,
        "since": "2026-11-01T10:00:00+0000",
        "restarts": 0,
        **fields,
    }
    (run_dir / ".lock").write_text(json.dumps(holder))
    return holder


def test_second_job_is_refused_before_anything_moves_and_sigkill_releases(
    hold, configure, tmp_path
):
    config = configure(".", "train.resume=never")
    holder = hold(SLURM_JOB_ID="4711", SLURMD_NODENAME="node7")
    (tmp_path / "metrics.jsonl").write_text("kept\n")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"is in use by") as caught:
        train(config)
    assert time.monotonic() - began < 20
    assert re.search(
        rf"in use by pid {holder.pid} on host node7, Slurm job 4711, since 20\d\d-.*expected one "
        r"job a run folder; .* \(scancel 4711\), or .* run_dir=",
        str(caught.value),
    )
    assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"
    assert not list(tmp_path.glob("previous-*"))
    holder.kill()
    holder.wait()
    with RunLock(tmp_path, ALONE):
        content = json.loads((tmp_path / ".lock").read_text())
        assert content["pid"] == os.getpid()
    assert json.loads((tmp_path / ".lock").read_text()) == {}


def test_one_process_does_not_take_a_folder_twice(tmp_path):
    message = rf"in use by pid {os.getpid()} .*kill {os.getpid()}"
    with RunLock(tmp_path, ALONE), pytest.raises(ValueError, match=message):
        RunLock(tmp_path, ALONE).acquire()
    with RunLock(tmp_path, ALONE):
        pass


def test_a_later_process_of_the_same_number_takes_over(tmp_path):
    write_holder(tmp_path, **{**Identity.own().as_dict(), "started": 1})
    with RunLock(tmp_path, ALONE):
        pass


def test_cut_off_content_is_no_holder(tmp_path):
    (tmp_path / ".lock").write_text('{"rank": 0, "ho')
    with RunLock(tmp_path, ALONE):
        assert json.loads((tmp_path / ".lock").read_text())["rank"] == 0


def test_living_lock_of_another_machine(tmp_path):
    """Its file changes while we look."""
    write_holder(tmp_path)
    beating = threading.Timer(0.3, write_holder, (tmp_path,))
    beating.start()
    with pytest.raises(ValueError, match=r"in use by pid 77 on host elsewhere, since 2026-11-01"):
        RunLock(tmp_path, ALONE, heartbeat=5.0).acquire()
    beating.join()


def test_stale_lock_of_another_machine_is_taken_over(tmp_path, caplog):
    write_holder(tmp_path, job="12")
    os.utime(tmp_path / ".lock", (time.time() - 100, time.time() - 100))
    began = time.monotonic()
    with RunLock(tmp_path, ALONE):
        assert time.monotonic() - began < 2
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert "taken over from pid 77 on host elsewhere, Slurm job 12" in caplog.text


def test_silent_lock_of_another_machine_is_waited_for(tmp_path, caplog):
    write_holder(tmp_path)
    began = time.monotonic()
    with RunLock(tmp_path, ALONE, heartbeat=0.3):
        assert 0.8 < time.monotonic() - began < 10
    assert "waiting for the next one" in caplog.text
    assert not list(tmp_path.glob(".lock-*"))


def test_restarted_job_takes_over_from_itself(tmp_path, monkeypatch, caplog):
    write_holder(tmp_path, job="12", restarts=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    began = time.monotonic()
    with RunLock(tmp_path, ALONE):
        assert time.monotonic() - began < 5
    assert "before this job restarted" in caplog.text


def test_sign_of_life_and_a_lock_that_was_taken_over(hold, tmp_path):
    holder = hold(heartbeat=0.2)
    first = os.stat(tmp_path / ".lock").st_mtime_ns
    until = time.monotonic() + 20
    while os.stat(tmp_path / ".lock").st_mtime_ns == first:
        assert time.monotonic() < until
        time.sleep(0.05)
    write_holder(tmp_path)
    _, said = holder.communicate(timeout=30)
    assert holder.returncode == 1
    assert "taken over by pid 77 on host elsewhere" in said


def test_file_system_without_locks(tmp_path, monkeypatch, hold, caplog):
    """Then the content alone counts: a living process of this machine, or a dead one."""

    def unsupported(descriptor: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    holder = hold()
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with pytest.raises(ValueError, match=rf"in use by pid {holder.pid} "):
        RunLock(tmp_path, ALONE).acquire()
    holder.kill()
    holder.wait()
    with RunLock(tmp_path, ALONE):
        pass
    assert "the file system has no locks" in caplog.text
