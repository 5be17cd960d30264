"""Ranks from the environments of torchrun, srun and a plain shell."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from llmtrain.distributed import World, choose_device, discover, first_host

FIVE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
SRUN = {
    "SLURM_JOB_ID": "40123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_alone():
    environ = {}
    assert discover(environ) == World(rank=0, size=1, local_rank=0)
    assert environ.keys() == FIVE
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(environ["MASTER_PORT"])))  # it is free
    assert discover(environ) == World(rank=0, size=1, local_rank=0)  # asked again


def test_torchrun():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    environ |= {"MASTER_ADDR": "node7", "MASTER_PORT": "29400"}
    before = dict(environ)
    assert discover(environ) == World(rank=3, size=4, local_rank=1)
    assert environ == before


def test_srun():
    environ = dict(SRUN)
    assert discover(environ) == World(rank=5, size=8, local_rank=1)
    assert {name: environ[name] for name in FIVE} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "24123",
    }


def test_srun_respects_a_given_address():
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    discover(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_batch_script_is_alone():
    """sbatch sets SLURM_NTASKS and SLURM_PROCID=0 for the script too, but no step."""
    environ = {**SRUN, "SLURM_PROCID": "0"}
    del environ["SLURM_STEP_ID"]
    assert discover(environ) == World(rank=0, size=1, local_rank=0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[003-010,12],cpu1", "gpu003"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[1-2]n[05-08]", "rack1n05"),
        ("n[1-3]-ib", "n1-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"got WORLD_SIZE=2 but no MASTER_ADDR.*torchrun or srun"):
        discover({"RANK": "0", "WORLD_SIZE": "2"})
    world = World(rank=3, size=4, local_rank=3)
    with pytest.raises(ValueError, match=r"train.device: got 'tpu', expected auto, cpu or cuda"):
        choose_device("tpu", world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"rank 3 is number 3 on its machine, which shows 2 GPUs.*at most 2 ranks"
    ):
        choose_device("cuda", world)
    assert choose_device("cuda", World(rank=3, size=4, local_rank=1)) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", world) == torch.device("cpu")


def test_lone_rank_starts_though_its_port_was_taken_meanwhile():
    code = """
import os, socket, torch
from llmtrain import distributed
world = distributed.discover(os.environ)
taken = socket.socket()
taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
taken.listen()
distributed.start(world, torch.device("cpu"))
"""
    environment = {name: value for name, value in os.environ.items() if name not in FIVE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
