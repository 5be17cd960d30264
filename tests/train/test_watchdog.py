"""Ranks that hang end with a report that names the right one and its place."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from llmtrain.distributed import World
from llmtrain.exits import FAILURE, HUNG
from llmtrain.train import hang_report, watchdog
from llmtrain.train.processes import ALIVE, ENDED, Identity, start_ticks, state_of
from llmtrain.train.watchdog import Watch, Watchdog, collective_timeout, nccl_status, within

ROOT = Path(__file__).resolve().parents[2]
KILLED = -9


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all scenarios of the worker, which run at once."""
    out = tmp_path_factory.mktemp("hung")
    path = os.pathsep.join(str(ROOT / package) for package in ("", "kernels", "data_prep"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).parent / "workers" / "hang_worker.py"
    subprocess.run([sys.executable, worker, out], env=environment, check=True, timeout=240)
    return out


def codes(hung: Path, scenario: str) -> dict[str, int]:
    return json.loads((hung / "codes.json").read_text())[scenario]


def verdict(hung: Path, scenario: str) -> str:
    (path,) = (hung / scenario / "hangs").glob("*/verdict.txt")
    return path.read_text()


def test_ranks_that_move_are_left_alone(hung):
    assert codes(hung, "fine") == {"0": 0, "1": 0}
    assert not (hung / "fine" / "hangs").exists()
    assert (hung / "fine" / "rank-1.txt").read_text() == "finished\n"


def test_rank_without_data(hung):
    """Step 3: the thread prepares steps ahead, so the rows of step 4 are missed by 3 too."""
    assert set(codes(hung, "data").values()) == {HUNG}
    said = verdict(hung, "data")
    assert re.search(r"(?m)^lags    rank 1 \(host \S+, pid \d+\): step \d, data, for \d+ s; ", said)
    assert re.search(r"thread prefetch_0 \(\d+\) at \S*hang_worker.py:\d+ in read_dead_disk", said)
    assert re.search(r"called by llmtrain/data/prefetch.py:\d+ in step", said)
    assert re.search(r"(?m)^waits   rank 0 .*reduce.*waits for other ranks in all_reduce", said)
    assert said in (hung / "data" / "rank-0.txt").read_text()


def test_rank_stuck_in_the_forward_pass(hung):
    assert set(codes(hung, "forward").values()) == {HUNG}
    said = verdict(hung, "forward")
    lag = re.search(r"(?m)^lags    rank 1 .*step 4, forward, .*$", said)
    assert "hang_worker.py" in lag[0]
    assert "in sleep_in_forward" in lag[0]
    assert re.findall(r"(?m)^waits   rank (\d)", said) == ["0", "2"]
    assert "3 of 3 ranks gave a report" in said
    (report,) = (hung / "forward" / "hangs").glob("*/rank-00001.json")
    stacks = json.loads(report.read_text())["stacks"]
    (main,) = (frames for name, frames in stacks.items() if name.startswith("MainThread"))
    assert "in sleep_in_forward" in main[0]
    assert "in sleep_in_forward" in report.with_suffix(".txt").read_text()


def test_save_in_the_background_whose_disk_is_dead(hung):
    """Both ranks wait for their own thread; that of rank 0 waits for the other's."""
    assert set(codes(hung, "save").values()) == {HUNG}
    said = verdict(hung, "save")
    lag = re.search(r"(?m)^lags    rank 1 .*step 6, save, .*$", said)
    assert re.search(r"saving.py:\d+ in wait; .*read_dead_disk", lag[0])
    assert re.search(r"(?m)^waits   rank 0 .*save.*waits for other ranks in all_reduce", said)


def test_stopped_rank_gives_no_report_and_is_named(hung):
    assert codes(hung, "stopped") == {"0": HUNG, "2": HUNG, "1": KILLED}
    said = verdict(hung, "stopped")
    assert re.search(r"(?m)^silent  rank 1 \(.*\) gave no report: stopped by a signal", said)
    assert re.findall(r"(?m)^waits   rank (\d)", said) == ["0", "2"]
    assert "lags" not in said


def test_rank_blocked_in_native_code(hung):
    """No Python thread of it runs: its stack comes from outside of Python."""
    assert codes(hung, "native") == {"0": HUNG, "1": FAILURE}
    assert re.search(r"(?m)^silent  rank 1 .*blocked in native code$", verdict(hung, "native"))
    dumped = (hung / "native" / "rank-1.txt").read_text()
    assert re.search(r"Timeout .*\n(.|\n)*hang_worker.py\", line \d+ in misbehave", dumped)


def test_killed_rank_is_named_in_the_others_error(hung):
    assert codes(hung, "killed") == {"0": FAILURE, "1": KILLED}
    said = (hung / "killed" / "rank-0.txt").read_text()
    assert re.search(r"llmtrain: rank 1 \(host \S+, pid \d+\) has ended, and rank 0 ", said)
    assert not (hung / "killed" / "hangs").exists()


def run_ranks(ranks: int, overrides: list[str]) -> list[subprocess.CompletedProcess]:
    """`llmtrain train` on each rank, without a launcher that ends them all when one does."""
    path = os.pathsep.join(str(ROOT / package) for package in ("", "kernels", "data_prep", "eval"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "llmtrain.cli", "train", *overrides]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=200) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, *output)
        for process, output in zip(started, outputs)
    ]


def test_training_that_hangs_ends_with_its_own_exit_code(corpus, small, tmp_path):
    limits = ["health.hang_seconds=8", "health.first_step_seconds=100"]
    run_dir = tmp_path / "run"
    overrides = [*corpus, *small, *limits, "guard.inject=[hang@7:rank1]", f"run_dir={run_dir}"]
    ended = run_ranks(2, overrides)
    assert [rank.returncode for rank in ended] == [HUNG, HUNG], ended
    (path,) = (run_dir / "hangs").glob("*/verdict.txt")
    said = path.read_text()
    assert re.search(r"(?m)^lags    rank 1 .*step 7, forward, .*llmtrain/train/faults.py", said)
    assert re.search(r"(?m)^waits   rank 0 .*step 7, reduce, .*waits for other ranks in", said)
    assert said in ended[0].stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000005\n"


@pytest.mark.slow
def test_training_whose_rank_is_killed(corpus, small, tmp_path):
    overrides = [*corpus, *small, "guard.inject=[kill@7:rank1]", f"run_dir={tmp_path / 'run'}"]
    survivor, killed = run_ranks(2, overrides)
    assert (survivor.returncode, killed.returncode) == (FAILURE, KILLED), survivor
    assert re.search(r"llmtrain: rank 1 \(host \S+, pid \d+\) has ended, and", survivor.stderr)


def make(tmp_path: Path, watch: Watch, **limits: float) -> Watchdog:
    settings = {"hang_seconds": 600.0, "first_step_seconds": 1800.0} | limits
    return Watchdog(watch, World(rank=0, size=1, local_rank=0), tmp_path, **settings)


def test_limits_of_first_steps_and_saves(tmp_path):
    watch = Watch()
    guardian = make(tmp_path, watch)
    assert guardian.limit_of(watch.mark) == 1800
    seen = []
    for step in (11, 12, 13):
        watch.begin_step(step)
        seen.append(guardian.limit_of(watch.mark))
    assert seen == [1800, 1800, 600]
    assert watch.mark[:2] == ("data", 13)
    watch.at("validate", slow=True)
    assert guardian.limit_of(watch.mark) == 1800
    watch.at("validate")
    assert guardian.limit_of(watch.mark) == 600
    watch.at("save")
    assert guardian.limit_of(watch.mark) == 1800


def test_process_group_waits_longer_than_the_watchdog():
    for hang, first in ((600.0, 1800.0), (7200.0, 1800.0), (None, 5.0), (5.0, 10000.0)):
        health = {"hang_seconds": hang, "first_step_seconds": first}
        timeout = collective_timeout(health)
        assert timeout >= timedelta(minutes=30)
        assert timeout.total_seconds() > max(hang or 0, first) + 120


def test_without_a_limit_there_is_no_thread(tmp_path):
    before = threading.active_count()
    with make(tmp_path, Watch(), hang_seconds=None):
        assert threading.active_count() == before
    with make(tmp_path, Watch()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_marks_and_thread_cost_next_to_nothing(tmp_path):
    """A step sets 4 marks and 2 for each micro-batch. Of one micro-batch: below 3 us when measured
    alone; here on processors that others use too. The thread: about 0.1 % of one, likewise."""
    watch, steps, marks = Watch(), 2000, 8
    best = min(cost_of_marks(watch, steps, marks) for _ in range(5))
    assert best / steps < 10e-6
    with make(tmp_path, watch):
        began = time.process_time()
        time.sleep(1)
        assert time.process_time() - began < 0.02


def cost_of_marks(watch: Watch, steps: int, marks: int) -> float:
    began = time.process_time()
    for step in range(steps):
        watch.begin_step(step)
        for _ in range(marks - 1):
            watch.at("forward")
    return time.process_time() - began


def test_action_that_hangs_or_fails_is_given_up(capfd):
    began = time.monotonic()
    assert within(0.1, lambda: time.sleep(5)) is None
    assert time.monotonic() - began < 2
    assert within(5, lambda: 7) == 7
    assert within(5, lambda: 1 / 0) is None
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_rank_that_is_gone_while_this_one_waits(tmp_path, monkeypatch):
    """NCCL may not notice: then the watchdog does, long before its limit."""
    child = subprocess.Popen(["sleep", "60"])
    own = Identity.own(0)
    peer = dataclasses.replace(own, rank=1, pid=child.pid, started=start_ticks(child.pid))
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr(watchdog, "ORPHANED", 0.5)
    monkeypatch.setattr(Watchdog, "waits", lambda self: True)
    monkeypatch.setattr(Watchdog, "end", lambda self, *said: ended.append(said))
    watched = make(tmp_path, Watch(), grace=2.0)
    watched.ranks = [own, peer]
    with watched:
        time.sleep(1.5)
        assert not ended
        child.kill()
        wait_for(lambda: ended)
    child.wait()
    assert ended[0] == (f"{peer} has ended, and this rank waits for it", FAILURE)


def test_states_of_processes():
    own = Identity.own(0)
    assert state_of(own.pid, own.started) == ALIVE
    assert state_of(own.pid, own.started - 1) == ENDED  # the number was another process's
    child = subprocess.Popen(["sleep", "60"])
    began = start_ticks(child.pid)
    assert state_of(child.pid, began) == ALIVE
    child.kill()
    wait_for(lambda: state_of(child.pid, began) == ENDED)  # a zombie
    child.wait()
    assert state_of(child.pid, began) == ENDED


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def identities(hosts: str) -> list[Identity]:
    return [
        Identity(rank=i, host=host, pid=100 + i, job=None, boot=host, started=1)
        for i, host in enumerate(hosts)
    ]


def report(rank: int, count: int, phase: str, waits: tuple[str, str] | None, **more: object):
    ranks = identities("aabb")
    peers = {str(r.rank): ALIVE for r in ranks if r.host == ranks[rank].host and r.rank != rank}
    known = {"step": 7, "slow": False, "idle": 600.0, "place": "a.py:1 in f", "threads_at": {}}
    who = {"rank": rank, "host": ranks[rank].host, "pid": 100 + rank, "peers": peers}
    return {**known, **who, "count": count, "phase": phase, "waits": waits, **more}


def starts(text: str) -> list[str]:
    return [re.match(r"\w+ +rank \d", line)[0] for line in text.splitlines() if " rank " in line]


DEVICE = ("device", "synchronize")


def test_gpu_hosts_wait_one_step_later_than_the_rank_that_lags():
    """Three hosts ran ahead into read_results of step 8; the fourth never left data of step 7."""
    reports = [report(r, 31, "read_results", DEVICE, step=8) for r in (0, 1, 3)]
    said = hang_report.verdict([*reports, report(2, 20, "data", None)], identities("aabb"))
    assert starts(said) == ["lags    rank 2", "waits   rank 0", "waits   rank 1", "waits   rank 3"]


def test_of_busy_ranks_the_last_one_lags():
    """Rank 0 has left the broadcast that it sent, rank 1 never came to receive it."""
    waits = ("collective", "broadcast")
    reports = [report(0, 40, "save", None), report(1, 38, "validate", None)]
    reports += [report(r, 40, "save", waits) for r in (2, 3)]
    said = hang_report.verdict(reports, identities("aabb"))
    assert starts(said) == ["lags    rank 1", "waits   rank 0", "waits   rank 2", "waits   rank 3"]


def test_all_devices_wait_and_nccl_tells_which_is_late():
    reports = [
        report(r, 31, "read_results", DEVICE, nccl={"started": 90 - (r == 3)}) for r in range(4)
    ]
    said = hang_report.verdict(reports, identities("aabb"))
    assert "no rank lags behind" in said
    assert said.endswith("nccl    collectives started on the device: 90, but fewer on rank 3 (89)")


def test_ranks_in_different_collectives():
    waits = ("collective", "all_reduce")
    reports = [report(r, 31 + (r == 2), "reduce", waits) for r in range(4)]
    said = hang_report.verdict(reports, identities("aabb"))
    assert starts(said)[:3] == ["behind  rank 0", "behind  rank 1", "behind  rank 3"]
    assert starts(said)[3] == "waits   rank 2"


def test_silent_machine():
    reports = [report(r, 31, "read_results", DEVICE) for r in (0, 1)]
    said = hang_report.verdict(reports, identities("aabb"))
    assert said.count("no rank of host b gave one: the machine is down or cut off") == 2


def test_status_of_nccl_is_summed_over_process_groups():
    groups = {
        "0": {"last_enqueued_collective": 9, "last_started_collective": 8},
        "1": {"last_enqueued_collective": 2, "last_started_collective": 2},
    }
    status = nccl_status({"pg_status": groups})
    assert status == {"enqueued": 11, "started": 10, "completed": None}
