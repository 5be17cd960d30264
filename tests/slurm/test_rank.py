"""What runs beside each rank: its log, signals to it, and the note of how it ended; and what the
driver makes of such notes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.manifest import step_name
from llmtrain.slurm import endings
from llmtrain.slurm.submission import BEGAN, Submission

ROOT = Path(__file__).resolve().parents[2]
# Stands for `python -m llmtrain.cli train --config <file>`: the file says what the rank does.
FAKE_CLI = """\
import signal, sys, time
does = open(sys.argv[-1]).read()
print("first line", flush=True)
sys.stderr.write("a warning\\n")
def stop(number, frame):
    print("stopped", flush=True)
    sys.exit(85)
if does == "train":
    signal.signal(signal.SIGUSR2, stop)
    print("ready", flush=True)
    time.sleep(60)
elif does == "import":
    print("ready", flush=True)
    time.sleep(60)
elif does.startswith("exit"):
    sys.exit(int(does.split()[1]))
"""


@pytest.fixture
def submission(tmp_path) -> Submission:
    found = Submission(
        folder=str(tmp_path / "run" / "slurm" / "s"),
        run_dir=str(tmp_path / "run"),
        code=str(ROOT),
        code_sha256="0" * 64,
        python=sys.executable,
        sizes=[2, 1],
        tasks_per_node=1,
        gpus=0,
        max_restarts=3,
        srun=[],
        exclude=[],
        preflight={"enabled": False},
    )
    found.path.mkdir(parents=True)
    found.save()
    start = found.start_folder("7", 0)
    start.mkdir(parents=True)
    (start / BEGAN).touch()
    return found


@pytest.fixture
def run_rank(submission, tmp_path):
    """run_rank(does, rank): the runner of a rank, as a process."""
    package = tmp_path / "code" / "llmtrain"
    package.mkdir(parents=True)
    for name in ("__init__.py", "exits.py"):
        (package / name).write_text((ROOT / "llmtrain" / name).read_text())
    (package / "slurm").symlink_to(ROOT / "llmtrain" / "slurm")
    (package / "cli.py").write_text(FAKE_CLI)

    def start(does: str, rank: int = 0) -> subprocess.Popen:
        config = tmp_path / f"does-{rank}"
        config.write_text(does)
        arguments = [submission.folder, str(submission.start_folder("7", 0)), str(config)]
        slurm = {"SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank + 1}", "SLURM_JOB_ID": "7"}
        path = {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "llmtrain.slurm.rank", *arguments],
            env=os.environ | slurm | path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def log_of(submission: Submission, rank: int) -> str:
    file = submission.logs / f"rank-{rank:05d}.log"
    return file.read_text() if file.exists() else ""


def until_ready(submission: Submission, rank: int) -> None:
    limit = time.monotonic() + 30
    while "ready" not in log_of(submission, rank):
        assert time.monotonic() < limit
        time.sleep(0.02)


def note(submission: Submission, rank: int) -> dict:
    file = submission.start_folder("7", 0) / f"rank-{rank:05d}.json"
    return json.loads(file.read_text())


def ending(submission: Submission, code: int = 0, nodes=("n1", "n2")) -> dict:
    return endings.outcome(submission, submission.start_folder("7", 0), nodes, code)


def test_two_ranks_that_finish(submission, run_rank):
    first, second = run_rank("exit 0", 0), run_rank("exit 0", 1)
    out, _ = first.communicate(timeout=60)
    other, errors = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(out.splitlines()) == ["a warning", "first line"]
    assert (other, errors) == ("", "")  # the job's log has rank 0 only
    lines = log_of(submission, 1).splitlines()
    assert "rank 1 of ? on n2" in lines[0]
    assert lines[-1].endswith("rank 1 ended with exit code 0")
    assert all(line[:4].isdigit() and line[23] == "Z" for line in lines)
    assert ending(submission) == {"cause": "finished", "why": "finished"}


def test_a_stop_is_no_failure_to_srun(submission, run_rank):
    rank = run_rank("train")
    until_ready(submission, 0)
    rank.send_signal(signal.SIGUSR2)
    rank.communicate(timeout=60)
    assert rank.returncode == 0
    assert note(submission, 0)["code"] == 85
    assert note(submission, 0)["said"] == "stopped"
    assert ending(submission, nodes=("n1",))["cause"] == "stopped"


def test_a_signal_before_the_training_can_take_it(submission, run_rank):
    rank = run_rank("import")
    until_ready(submission, 0)
    rank.send_signal(signal.SIGUSR2)
    rank.communicate(timeout=60)
    assert rank.returncode == 85  # the others may wait for this rank: srun is to end them
    assert ending(submission, 85)["cause"] == "stopped"


@pytest.mark.parametrize(("code", "cause"), [(1, "failure"), (2, "mistake")])
def test_a_rank_that_fails(submission, run_rank, code, cause):
    rank = run_rank(f"exit {code}", 1)
    _, errors = rank.communicate(timeout=60)
    assert rank.returncode == code
    assert "first line" in errors  # its last lines go to the job's log
    ended = ending(submission, code)
    assert ended["cause"] == cause
    assert ended["why"].startswith(f"rank 1 on n2 ended with exit code {code}: ")


def test_a_killed_rank(submission, run_rank):
    rank = run_rank("train", 1)
    until_ready(submission, 1)
    (child,) = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    rank.communicate(timeout=60)
    assert rank.returncode == 137
    ended = ending(submission, 137)
    assert ended["cause"] == "lost"
    assert "rank 1 on n2 ended with signal SIGKILL" in ended["why"]


def write_notes(submission: Submission, *codes: int | None) -> None:
    """Notes of ranks that ended one after the other; None: of a rank that left none."""
    for rank, code in enumerate(codes):
        if code is not None:
            record = {"rank": rank, "node": f"n{rank + 1}", "code": code, "time": rank, "said": ""}
            file = submission.start_folder("7", 0) / f"rank-{rank:05d}.json"
            file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("codes", "cause", "why"),
    [
        ((0, None), "lost", "ranks 1 were killed"),
        ((1, 2), "mistake", "rank 1 on n2"),  # the message is where the 2 is
        ((1, 86), "hung", "rank 1 on n2"),
        ((85, 1), "failure", "rank 1 on n2"),
        ((-9, 1), "lost", "rank 0 on n1 ended with signal SIGKILL"),
        ((1, -9), "failure", "rank 0 on n1"),  # the second was ended because of the first
        ((85, 85), "stopped", "newest checkpoint of step None"),
        ((85, 0), "stopped", "newest checkpoint of step None"),
    ],
)
def test_causes(submission, codes, cause, why):
    write_notes(submission, *codes)
    ended = ending(submission, 1)
    assert ended["cause"] == cause
    assert why in ended["why"]


VERDICT = """\
silent  rank 1 (host n2, pid 5) gave no report: stopped or ended
waits   rank 0 (host n1, pid 4): step 3, backward, for 61 s; waits for other ranks
"""


def test_the_watchdog_names_nodes(submission):
    write_notes(submission, 86, None)
    report = Path(submission.run_dir) / "hangs" / "20261123-120000"
    report.mkdir(parents=True)
    (report / "verdict.txt").write_text(VERDICT)
    assert ending(submission, 86)["exclude"] == ("n2",)
    (report / "verdict.txt").write_text(VERDICT.replace("waits   rank", "lags    rank"))
    assert ending(submission, 86)["exclude"] == ()  # that is all nodes
    (report / "verdict.txt").write_text(VERDICT)
    long_ago = time.time() - 3600
    os.utime(report / "verdict.txt", (long_ago, long_ago))
    assert ending(submission, 86)["exclude"] == ()  # of an earlier start


def test_a_lost_node(submission, tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\ncase $4 in n2) echo State=DOWN*;; *) echo State=MIXED;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_notes(submission, 1, None)
    assert ending(submission, 1) == {"cause": "lost", "why": "lost node n2", "exclude": ("n2",)}


def test_newest_step(tmp_path):
    assert endings.newest_step(tmp_path) is None
    for name in (step_name(20), step_name(100), "step-00000200.damaged-1", ".tmp-step-00000300"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert endings.newest_step(tmp_path) == 100
