"""Ranks as processes: one launch does many checks, since each costs seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "kernels", "data_prep", "eval")


def launch(script: str, ranks: int, *arguments: object, ok: bool = True) -> str:
    """Run tests/train/workers/<script> on that many ranks; returns what it printed."""
    path = os.pathsep.join(str(ROOT / package) for package in PACKAGES)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else [])]
    command += [str(Path(__file__).parent / "workers" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


@pytest.fixture(scope="session")
def workers() -> Callable[..., str]:
    return launch
