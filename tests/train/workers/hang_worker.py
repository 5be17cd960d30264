"""Ranks that hang in several ways at once: hang_worker.py OUT.

Torch is imported once; every scenario forks its ranks, which take steps of sleep and a sum over
ranks under a Watchdog until one of them misbehaves at step BAD_STEP. OUT/<scenario>/rank-<R>.txt:
what a rank printed; OUT/codes.json: how each ended (negative: by that signal).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from llmtrain import distributed
from llmtrain.data.batch import Batch
from llmtrain.data.prefetch import Prefetcher
from llmtrain.train.saving import Save, Saver
from llmtrain.train.watchdog import Watch, Watchdog

HANG_SECONDS, GRACE, BAD_STEP, STEPS = 4.0, 8.0, 4, 6
BAD_RANK = 1
LONGEST = 60.0


class Rows:
    """A loader whose rows of the bad step never come."""

    rows_per_epoch = 1000

    def __init__(self, stuck: bool):
        self.stuck = stuck

    def batch(self, first_sample: int, rows: int) -> Batch:
        if self.stuck and first_sample >= 2 * (BAD_STEP - 1):
            read_dead_disk()
        tokens_BT = torch.zeros(rows, 4, dtype=torch.int64)
        return Batch(
            tokens_BT=tokens_BT,
            targets_BT=tokens_BT,
            weights_BT=tokens_BT.float(),
            doc_starts_BT=tokens_BT == 1,
        )


def read_dead_disk() -> None:
    time.sleep(1000)


def sleep_in_forward() -> None:
    time.sleep(1000)


class Disk:
    """A checkpoint writer that sums over ranks, and whose disk is dead on the bad rank."""

    def __init__(self, dead: bool):
        self.dead = dead

    def write(self, *arguments: object) -> int:
        if self.dead:
            read_dead_disk()
        dist.all_reduce(torch.ones(3))
        return 0


def save(bad: bool) -> None:
    """Wait for a save in the background, as the loop does."""
    saver = Saver(Disk(dead=bad), background=True, failures=1)
    saver.source = SimpleNamespace(number=0)  # chunks that the writer took
    arguments = (Save(step=STEPS), None, saver.source, {})
    saver.thread = threading.Thread(target=saver.write, args=arguments)
    saver.thread.start()
    saver.settle()


def misbehave(scenario: str) -> None:
    """What the bad rank does in the forward pass of the bad step."""
    if scenario == "forward":
        sleep_in_forward()
    elif scenario == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif scenario == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif scenario == "native":
        ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock


def rank_main(scenario: str, out: Path, rank: int, size: int) -> None:
    world = distributed.discover(os.environ)
    distributed.start(world, torch.device("cpu"))
    watch = Watch()
    bad = rank == BAD_RANK
    limits = {"hang_seconds": HANG_SECONDS, "first_step_seconds": HANG_SECONDS, "grace": GRACE}
    with (
        Watchdog(watch, world, out, **limits),
        Prefetcher(
            Rows(stuck=bad and scenario == "data"),
            start_step=0,
            global_rows=2 * size,
            rank=0,
            world=size,
            micro_rows=2,
            mask_documents=True,
            device="cpu",
        ) as batches,
    ):
        for step in range(1, STEPS + 1):
            watch.begin_step(step)
            next(batches)
            watch.at("forward")
            if bad and step == BAD_STEP:
                misbehave(scenario)
            time.sleep(0.05)
            watch.at("reduce")
            dist.all_reduce(torch.ones(3))
        if scenario == "save":
            watch.at("save")
            save(bad)
    print("finished", flush=True)


SCENARIOS = {"fine": 2, "data": 2, "forward": 3, "stopped": 3, "killed": 2, "native": 2, "save": 2}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(scenario: str, folder: Path, rank: int, size: int, port: int) -> None:
    """A forked rank, to its end."""
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = 1
    try:
        rank_main(scenario, folder, rank, size)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(scenario: str, out: Path, size: int) -> dict[int, int]:
    """Fork the ranks; rank -> process number."""
    folder = out / scenario
    folder.mkdir()
    port, pids = free_port(), {}
    for rank in range(size):
        pids[rank] = os.fork()
        if pids[rank] == 0:
            child(scenario, folder, rank, size, port)
    return pids


def collect(running: dict[str, dict[int, int]]) -> dict[str, dict[int, int]]:
    """How the ranks end; those that do not, because they are stopped or too late, are killed."""
    codes: dict[str, dict[int, int]] = {scenario: {} for scenario in running}
    until = time.monotonic() + LONGEST
    while any(running.values()):
        time.sleep(0.1)
        for scenario, pids in running.items():
            if time.monotonic() > until or (scenario == "stopped" and set(pids) == {BAD_RANK}):
                for pid in pids.values():
                    os.kill(pid, signal.SIGKILL)
            for rank, pid in list(pids.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[scenario][rank] = os.waitstatus_to_exitcode(status)
                    del pids[rank]
    return codes


def main() -> None:
    out = Path(sys.argv[1])
    codes = collect({scenario: start(scenario, out, size) for scenario, size in SCENARIOS.items()})
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
