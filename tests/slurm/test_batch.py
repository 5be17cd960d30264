"""The batch driver as a process, with stand-ins for Slurm's programs: what it starts, asks for and
writes down. (On a real Slurm: test_story.py, test_jobs.py.)"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.slurm.submission import Submission, read_lines

ROOT = Path(__file__).resolve().parents[2]
# $FAKE/job: what scontrol says of the job; $FAKE/does: how the ranks end, or "wait" for USR2.
SCONTROL = """\
case "$*" in
"show hostnames"*) echo "$3" | tr , '\\n';;
*"show job"*) cat "$FAKE/job";;
*"show node"*) echo "NodeName=$4 State=ALLOCATED NodeAddr=127.0.0.1";;
*) echo "scontrol $*" >> "$FAKE/calls"; [ ! -f "$FAKE/refuse" ];;
esac
"""
SRUN = """\
import json, os, pathlib, signal, sys, time
fake = pathlib.Path(os.environ["FAKE"])
with (fake / "calls").open("a") as file:
    file.write(" ".join(["srun", *sys.argv[1:]]) + "\\n")
does = (fake / "does").read_text()
if does == "wait":
    told, parent = [], os.getppid()
    signal.signal(signal.SIGUSR2, lambda *_: told.append(1))
    (fake / "waits").touch()
    while not told:
        time.sleep(0.05)
        if os.getppid() != parent:
            sys.exit("the driver was killed")
    does = "85 85"
start = pathlib.Path(sys.argv[-2])
for rank, code in enumerate(map(int, does.split())):
    record = {"rank": rank, "node": "n", "code": code, "time": rank, "said": "words"}
    (start / f"rank-{rank:05d}.json").write_text(json.dumps(record))
if (fake / "saves").exists():
    step = pathlib.Path((fake / "saves").read_text())
    step.mkdir(parents=True, exist_ok=True)
    (step.parent / "latest").write_text(step.name)
sys.exit(1 if any(code not in ("0", "85") for code in does.split()) else 0)
"""
RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 StartTime=2026-11-23T12:00:00\n"


class Job:
    """A submission, and starts of its driver."""

    def __init__(self, folder: Path, **facts):
        self.fake, self.run_dir = folder / "fake", folder / "run"
        self.fake.mkdir()
        for name, text in (("scontrol", f"#!/bin/sh\n{SCONTROL}"), ("sinfo", SINFO)):
            self.program(name, text)
        self.program("srun", f"#!{sys.executable}\n{SRUN}")
        (self.fake / "job").write_text(RUNNING)
        (self.fake / "calls").write_text("")
        defaults = {
            "folder": str(self.run_dir / "slurm" / "s"),
            "run_dir": str(self.run_dir),
            "code": str(ROOT),
            "code_sha256": "0" * 64,
            "python": "/the/python",
            "sizes": [2],
            "tasks_per_node": 1,
            "gpus": 0,
            "max_restarts": 3,
            "srun": ["--mpi=none"],
            "exclude": ["n9"],
            "preflight": {"enabled": False},
        }
        self.submission = Submission(**defaults | facts)
        self.submission.path.mkdir(parents=True)
        self.submission.save()

    def program(self, name: str, text: str) -> None:
        (self.fake / name).write_text(text)
        (self.fake / name).chmod(0o755)

    def start(self, does: str, *, restart: int = 0, nodes: str = "n1,n2") -> subprocess.Popen:
        (self.fake / "does").write_text(does)
        environment = {
            **os.environ,
            "PATH": f"{self.fake}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FAKE": str(self.fake),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_PARTITION": "low",
            "SLURM_RESTART_COUNT": str(restart),
            "RANK": "5",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "llmtrain.slurm.batch", self.submission.folder],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, does: str, **keys) -> tuple[int, dict]:
        """The exit code and the decision of a start."""
        process = self.start(does, **keys)
        output, _ = process.communicate(timeout=60)
        decision = read_lines(self.submission.decisions)[-1]
        assert decision["reason"] in output
        assert decision["reason"] in (self.submission.logs / "driver.log").read_text()
        return process.returncode, decision

    def calls(self, program: str) -> list[str]:
        lines = (self.fake / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(program)]

    def saves(self, step: int) -> None:
        """The next ranks leave a checkpoint."""
        path = self.run_dir / "checkpoints" / f"step-{step:08d}"
        (self.fake / "saves").write_text(str(path))


SINFO = "#!/bin/sh\nprintf 'n1\\nn2\\nn3\\nn9\\n'\n"


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_a_start_that_finishes(job):
    job.saves(20)
    code, decision = job.run("0 0")
    assert (code, decision["action"], decision["step"]) == (0, "done", 20)
    assert decision["nodes"] == ["n1", "n2"]
    (line,) = job.calls("srun")
    for option in (
        *("--nodes=2", "--nodelist=n1,n2", "--ntasks=2", "--ntasks-per-node=1", "--mpi=none"),
        *("--kill-on-bad-exit=1", "--export=ALL", "/the/python -m llmtrain.slurm.rank"),
    ):
        assert f" {option} " in line
    assert line.endswith("/slurm/s/config.yaml")
    assert not job.calls("scontrol")


def test_a_stop_is_requeued_and_continues(job):
    """The second start resumes by itself; before there is a checkpoint it begins as the first."""
    assert job.run("85 85")[1]["action"] == "requeue"
    job.saves(20)
    assert job.run("85 85", restart=1)[1]["advanced"]
    assert job.run("0 0", restart=2)[1]["action"] == "done"
    assert (
        job.calls("scontrol")
        == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n9"] * 2
    )
    configs = [line.rpartition("/")[2] for line in job.calls("srun")]
    assert configs == ["config.yaml", "config.yaml", "restart.yaml"]


def test_an_older_checkpoint_is_not_of_this_job(job):
    """With train.resume=never a restart begins anew, until the job has saved."""
    old = job.run_dir / "checkpoints"
    (old / "step-00000500").mkdir(parents=True)
    (old / "latest").write_text("step-00000500")
    hour_ago = time.time() - 3600
    os.utime(old / "latest", (hour_ago, hour_ago))
    job.run("85 85")
    job.run("85 85", restart=1)
    assert [line.rpartition("/")[2] for line in job.calls("srun")] == ["config.yaml"] * 2


@pytest.mark.parametrize(
    ("does", "code", "cause"), [("2 2", 2, "mistake"), ("0 1", 1, "failure"), ("1", 1, "failure")]
)
def test_what_is_not_requeued(job, does, code, cause):
    ended, decision = job.run(does)
    assert (ended, decision["action"], decision["cause"]) == (code, "end", cause)
    assert not job.calls("scontrol")


@pytest.mark.parametrize(
    ("number", "action", "code"), [(signal.SIGUSR2, "requeue", 0), (signal.SIGTERM, "end", 85)]
)
def test_signals_reach_the_ranks(job, number, action, code):
    process = job.start("wait")
    limit = time.monotonic() + 30
    while not (job.fake / "waits").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    (decision,) = read_lines(job.submission.decisions)
    assert (decision["action"], process.returncode) == (action, code)


def test_preemption_and_cancellation_are_noted_at_once(job):
    """Slurm may kill the driver before the ranks end."""
    for restarts, action in ((1, "wait"), (0, "end")):
        job.submission.decisions.unlink(missing_ok=True)
        (job.fake / "waits").unlink(missing_ok=True)
        process = job.start("wait")
        while not (job.fake / "waits").exists():
            time.sleep(0.05)
        ending = RUNNING.replace("RUNNING", "COMPLETING").replace(
            "Restarts=0", f"Restarts={restarts}"
        )
        (job.fake / "job").write_text(ending)
        process.send_signal(signal.SIGTERM)
        limit = time.monotonic() + 30
        while not read_lines(job.submission.decisions):
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert process.poll() is None
        process.kill()
        process.wait()
        (decision,) = read_lines(job.submission.decisions)
        assert decision["action"] == action
        (job.fake / "job").write_text(RUNNING)


def test_excluded_nodes_stay_out(tmp_path):
    """Also when Slurm gives one again; then the others do, or a requeue has to."""
    job = Job(tmp_path, sizes=[2, 1])
    line = {"job": "7", "action": "requeue", "cause": "bad node", "advanced": False}
    job.submission.decisions.write_text(json.dumps(line | {"exclude": ["n2"]}) + "\n")
    assert job.run("0", restart=1)[1]["action"] == "done"
    assert "--nodelist=n1 " in job.calls("srun")[0]
    decision = job.run("0", restart=2, nodes="n2")[1]
    assert (decision["action"], decision["exclude"]) == ("requeue", ["n2"])
    assert job.calls("scontrol")[-1].endswith("ExcNodeList=n2,n9")


def test_too_few_nodes_are_left(job):
    line = {"job": "7", "action": "requeue", "cause": "bad node", "advanced": False}
    job.submission.decisions.write_text(json.dumps(line | {"exclude": ["n2", "n3"]}) + "\n")
    code, decision = job.run("0 0", restart=1)
    assert (code, decision["action"]) == (1, "end")
    assert "too few nodes of the partition are left" in decision["reason"]


def test_slurm_refuses_the_requeue(job):
    (job.fake / "refuse").touch()
    code, decision = job.run("85 85")
    assert (code, decision["action"]) == (1, "end")
    assert "submit again: sbatch" in decision["reason"]


def test_a_task_of_an_array_names_itself(job, monkeypatch):
    """The number of the last task is that of the whole array: a requeue of it would mean all."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    job.run("85 85")
    assert job.calls("scontrol")[0] == "scontrol requeue 7_3"
