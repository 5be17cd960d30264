"""`llmtrain preflight`: the node check by hand, on this machine alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from llmtrain.distributed import free_port
from llmtrain.exits import FAILURE, FINISHED
from llmtrain.groups import parse
from llmtrain.slurm.resources import Resources
from llmtrain.slurm.verdict import Verdict, judge, read_reports, wishes

READS = ("gpus", "tasks_per_node", "run_dir", "out", "preflight")


def run_preflight(config: dict) -> int:
    """Check this machine; returns the exit code."""
    for override in parse(config["overrides"]):
        if override.key_or_group.partition(".")[0] not in READS:
            raise ValueError(
                f"{override.input_line}: has no effect on `llmtrain preflight`, which reads "
                f"{', '.join(READS)}; remove it"
            )
    resources = Resources.of(config)
    wanted = wishes(
        config["preflight"], gpus=resources.gpus, nodes=1, run_dir=config["run_dir"], code=None
    )
    verdict = check_here(wanted, resources.tasks_per_node)
    print(verdict.table())
    if config["out"] is not None:
        text = json.dumps(verdict.to_json(), indent=1) + "\n"
        Path(config["out"]).write_text(text, encoding="utf-8")
    return FINISHED if verdict.good else FAILURE


def check_here(wanted: dict, ranks: int) -> Verdict:
    """The check with that many ranks on this machine."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "llmtrain.slurm.probes", json.dumps(wanted)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    lines: list[str] = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=wanted["timeout_seconds"])
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        lines += output.splitlines()
    return judge(read_reports(lines), [node], ranks, wanted)
