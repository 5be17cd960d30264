"""Two ranks: rank 0's configuration counts, and its mistake ends both with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from llmtrain.distributed import free_port

SHARE = """
import json, os, sys
import torch.distributed as dist
from llmtrain.shared_config import shared
from llmtrain.distributed import discover
rank = os.environ["RANK"]
with shared(discover(os.environ), lambda: {"composed by": rank}) as config:
    dist.init_process_group("gloo")  # the group meets where the store already is
    values = [None, None]
    dist.all_gather_object(values, config)
    dist.destroy_process_group()
    print(json.dumps(values))
"""


def run_two(*command: str) -> list[subprocess.CompletedProcess]:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    return done


def test_rank_0_composes():
    for done in run_two("-c", SHARE):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [{"composed by": "0"}] * 2


def test_a_mistake_ends_all_ranks_with_one_message():
    first, second = run_two("-m", "llmtrain.cli", "train", "mixer=atention")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("llmtrain: error: mixer=atention: no such option") == 1
    assert "llmtrain: error" not in second.stderr
    assert "Traceback" not in first.stderr + second.stderr


def test_commands_of_one_process():
    for done in run_two("-m", "llmtrain.cli", "plan"):
        assert done.returncode == 2
        assert "llmtrain plan: got 2 ranks, expected one process" in done.stderr
