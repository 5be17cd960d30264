"""Reading sinfo, squeue and scontrol (recorded outputs of Slurm 22.05 and 24.11), and whether a job
fits."""

from __future__ import annotations

import re

import pytest

from llmtrain.config import compose
from llmtrain.slurm import cluster, endings, partitions, queue
from llmtrain.slurm.partitions import Kind
from llmtrain.slurm.resources import Resources

SINFO = """\
debug*|up|1:00:00|2|64|257000|(null)
gpu|up|2-00:00:00|12|96|1031000|gpu:h100:8(S:0-1)
gpu|up|2-00:00:00|4|64|515000|gpu:a100:4,nvme:1
old|down|infinite|8|32|128000|gpu:4
"""


def test_partitions():
    debug, gpu, old = partitions.parse(SINFO)
    assert (debug.name, debug.default, debug.up, debug.limit) == ("debug", True, True, 3600)
    assert (gpu.default, gpu.limit) == (False, 172800)
    assert gpu.kinds == (
        Kind(nodes=12, cpus=96, memory=1031000, gpus=8),
        Kind(nodes=4, cpus=64, memory=515000, gpus=4),
    )
    assert (old.up, old.limit, old.kinds[0].gpus) == (False, None, 4)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:a100:2,gpu:h100:2(S:0)", 4), ("nvme:3,mygpu:2", 0)],
)
def test_gres(gres, count):
    assert partitions.gpus(gres) == count


@pytest.mark.parametrize(
    "overrides",
    [
        ["nodes=2"],
        ["nodes=16", "gpus=4", "partition=gpu"],
        ["nodes=12", "gpus=8", "partition=gpu", "time=2-00:00:00", "mem=900G"],
        ["nodes=3", "partition='debug,gpu'"],
    ],
)
def test_what_fits(overrides):
    partitions.check(Resources.of(compose("launch", overrides)), partitions.parse(SINFO))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["partition=gpus"], "expected one of debug, gpu, old. Did you mean 'gpu'?"),
        (["partition=old"], "partition old takes no jobs now"),
        (["nodes=3"], "nodes: got 3, expected at most 2, the nodes of partition debug"),
        (["nodes=13", "gpus=8", "partition=gpu"], "nodes: got 13, expected at most 12"),
        (["gpus=9", "partition=gpu"], "gpus: got 9 GPUs a node, expected at most 8"),
        (["gpus=1"], "gpus: got 1 GPUs a node, expected at most 0"),
        (["time=1-00:00:00"], "expected at most 01:00:00, the limit of partition debug"),
        (["cpus_per_task=65"], "cpus_per_task or tasks_per_node: got 65 CPUs a node"),
        (["mem=300G"], "mem: got 307200 MiB of memory a node, expected at most 257000"),
        (["mem=lots"], "mem: got 'lots', expected a number of MiB or such as 64G"),
    ],
)
def test_what_does_not(overrides, message):
    resources = Resources.of(compose("launch", overrides))
    with pytest.raises(ValueError, match=re.escape(message)):
        partitions.check(resources, partitions.parse(SINFO))


SQUEUE = """\
22|2|PENDING|2||JobArrayTaskLimit|0:00|llmtrain train /runs/sweep
22|1|RUNNING|2|n[1-2]|None|0:44|llmtrain train /runs/sweep
31|N/A|PENDING|4||JobHeldUser|0:00|llmtrain train /runs/a|b
32|N/A|RUNNING|1|n3|None|1-02:03:04|(null)
"""


def test_queue():
    jobs = queue.parse(SQUEUE)
    assert [job.job for job in jobs] == ["22_2", "22_1", "31", "32"]
    assert [job.state for job in jobs] == ["PENDING", "RUNNING", "PENDING", "RUNNING"]
    assert jobs[1].nodes == "n[1-2]"
    assert jobs[2].comment == "llmtrain train /runs/a|b"
    assert jobs[2].reason == "JobHeldUser"


def test_a_run_with_a_job_gets_no_second(tmp_path):
    waiting = f"40|N/A|PENDING|1||Dependency|0:00|llmtrain eval {tmp_path}"
    with pytest.raises(ValueError, match=r"has job 40 already \(pending\).*scancel 40"):
        queue.check_free(tmp_path, queue.parse(waiting))
    queue.check_free(tmp_path / "other", queue.parse(waiting))
    folder = tmp_path / "slurm" / "20261123-120000"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text("{}")
    (folder / "job_id").write_text("32\n")
    with pytest.raises(ValueError, match=r"has job 32 already \(running\)"):
        queue.check_free(tmp_path, queue.parse(SQUEUE))


JOB = (
    "JobId=15 JobName=two UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=4294901746 "
    "Nice=0 Account=(null) QOS=normal {} Dependency=(null) Requeue=1 Restarts={} BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:01:00 TimeLimit=UNLIMITED EndTime=Unknown "
    "Command=/runs/a=b/job.sbatch Comment=llmtrain train /runs/two"
)


@pytest.mark.parametrize(
    ("state", "restarts", "running"),
    [
        ("JobState=RUNNING Reason=None", 0, True),
        ("JobState=COMPLETING Reason=None", 1, False),
        ("JobState=COMPLETING Reason=TimeLimit", 0, False),
        ("JobState=CANCELLED,COMPLETING Reason=None", 0, False),
        ("JobState=RUNNING,COMPLETING Reason=None", 0, False),
        ("JobState=RUNNING,SIGNALING Reason=None", 0, True),
    ],
)
def test_job(state, restarts, running):
    job = cluster.parse_job(JOB.format(state, restarts))
    assert (job.running, job.restarts) == (running, restarts)
    assert (job.reason == "TimeLimit") == ("TimeLimit" in state)


@pytest.mark.parametrize(
    ("preempted", "expected"),
    [("None", False), ("2026-11-23T14:03:32", True), ("2026-11-23T13:00:00", False)],
)
def test_a_job_that_is_being_preempted(preempted, expected):
    """A time before this start is that of an earlier preemption."""
    state = f"JobState=RUNNING StartTime=2026-11-23T14:00:00 PreemptTime={preempted}"
    assert cluster.parse_job(JOB.format(state, 1)).preempted == expected


@pytest.mark.parametrize(
    ("state", "gone"),
    [
        ("ALLOCATED", False),
        ("IDLE+DRAIN", False),
        ("DOWN*+DRAIN", True),
        ("ALLOCATED*", True),
        ("MIXED+NOT_RESPONDING", True),
        ("DOWN+NOT_RESPONDING", True),
        ("COMPLETING+DOWN", True),
    ],
)
def test_node_states(state, gone):
    text = f"NodeName=n1 Arch=x86_64 CPUAlloc=2 State={state} ThreadsPerCore=1"
    assert bool(endings.parse_state(text).intersection(endings.GONE)) == gone


def test_slurm_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"sbatch: not found on this machine.*dry_run=true"):
        cluster.run(["sbatch", "--version"])
    assert not queue.available()
