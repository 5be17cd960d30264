"""Ranks as processes: one launch does many checks, since each costs seconds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config import compose
from llmtrain.prep import run_prep

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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small prepared corpus; gives the overrides that choose it."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 6))) for _ in range(60)]
    for number in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(20, 400)))
        (folder / f"{number:02d}.txt").write_text(text)
    overrides = [
        "data=text",
        f"data.sources.text.root={folder}",
        f"data.root={folder / 'data'}",
        "data.val_fraction=0.2",
        "data.workers=1",
        "tokenizer.vocab_size=300",
    ]
    run_prep(compose("prep", overrides))
    return overrides


# A model of seconds: 2 layers, 8 rows a step.
SMALL = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.ffn_hidden=48",
    "train.seq_len=32",
    "train.global_batch_tokens=256",
    "train.total_tokens=3072",
    "train.micro_batch=4",
    "train.log_every=4",
    "train.val_every=6",
    "train.val_tokens=300",
    "train.save_every=5",
    "train.device=cpu",
    "health.straggler_factor=null",  # the machine of a test is busy with others
    "tracker=none",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    return SMALL


@pytest.fixture
def configure(corpus: list[str], tmp_path: Path) -> Callable[..., dict]:
    """configure("run", "train.keep=1", ...) -> a train configuration whose run_dir is tmp/run."""

    def make(name: str, *overrides: str) -> dict:
        return compose("train", [*corpus, *SMALL, f"run_dir={tmp_path / name}", *overrides])

    return make
