"""Tests on a real Slurm: which of them run on this machine, the cluster, and a corpus.

LLMTRAIN_SLURM=required (`make slurm` and CI set it): without Slurm's programs these tests fail.
Otherwise they are left out there, and pytest's header says so.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.config import compose
from llmtrain.prep import run_prep

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "kernels", "data_prep", "eval")


def load_cluster_module():
    """tests/ holds no packages, so the file beside this one is imported by its path."""
    spec = importlib.util.spec_from_file_location(
        "slurm_cluster", Path(__file__).parent / "cluster.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["slurm_cluster"] = module
    spec.loader.exec_module(module)
    return module


cluster = load_cluster_module()


def what_lacks() -> str | None:
    """Why no cluster can be started here, and what to do; None: it can."""
    if names := cluster.missing():
        return f"found no {', '.join(names)}; {cluster.INSTALL}"
    if getpass.getuser() != "root":
        return "a cluster's daemons have to be started as root"
    return None


def is_required() -> bool:
    return os.environ.get("LLMTRAIN_SLURM") == "required"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked slurm where no cluster can be started, unless required."""
    config.stash[LEFT_OUT] = 0
    if is_required() or what_lacks() is None:
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    items[:] = [item for item in items if not item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    if number := config.stash.get(LEFT_OUT, 0):
        return f"slurm: {number} tests are left out: {what_lacks()}"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A test that fails shows the queue and the ends of the logs."""
    report = yield
    if report.when == "call" and report.failed and "slurm" in item.funcargs:
        report.sections.append(("cluster", item.funcargs["slurm"].report()))
    return report


LEFT_OUT = pytest.StashKey[int]()


class Site(cluster.Cluster):
    """A cluster where llmtrain is installed: its command and packages are on the jobs' paths."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            self.environ.pop(name, None)
        bin_folder = str(Path(sys.executable).parent)
        self.environ |= {
            "PYTHONPATH": os.pathsep.join(str(ROOT / package) for package in PACKAGES),
            "PATH": os.pathsep.join([bin_folder, self.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def launch(self, *arguments: str) -> int:
        """`llmtrain launch`; the job of the training."""
        return self.job_of(self.run("llmtrain", "launch", *arguments))

    def job_of(self, printed: str) -> int:
        """The job of the training, in what `llmtrain launch` printed."""
        return int(re.search(r"^job +(\d+) \(train", printed, re.MULTILINE).group(1))

    def lines(self, file: Path) -> list[dict]:
        """A log of JSON lines; the last one may be under way."""
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def steps(self, run_dir: Path) -> list[int]:
        """The optimizer steps in a run's ledger."""
        ledger = self.lines(run_dir / "ledger.jsonl")
        return [line["step"] for line in ledger if "event" not in line]

    def starts(self, run_dir: Path) -> list[dict]:
        return self.lines(run_dir / "starts.jsonl")

    def decisions(self, run_dir: Path) -> list[dict]:
        """What the batch drivers of a run's jobs decided."""
        return self.lines(run_dir / "slurm" / "decisions.jsonl")

    def at_step(self, run_dir: Path, step: int, timeout: float = 120) -> None:
        """Wait until a run has made that step."""
        self.until(lambda: self.steps(run_dir)[-1:] >= [step], timeout, f"step {step}")


@pytest.fixture(scope="session")
def mini_slurm() -> Iterator[Site]:
    """The cluster of this session."""
    if reason := what_lacks():
        pytest.fail(f"Slurm tests: {reason}", pytrace=False)
    running = Site.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def slurm(mini_slurm: Site) -> Iterator[Site]:
    """The cluster, idle and whole before and after a test."""
    yield mini_slurm
    mini_slurm.clear()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 6))) for _ in range(60)]
    for number in range(40):
        text = " ".join(draw.choices(words, k=draw.randint(100, 1000)))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose a corpus made of the texts."""
    return [
        "data=text",
        f"data.sources.text.root={texts}",
        f"data.root={tmp_path_factory.mktemp('data')}",
        "data.val_fraction=0.2",
        "data.workers=1",
        "tokenizer.vocab_size=300",
    ]


@pytest.fixture(scope="session")
def prepared(corpus: list[str]) -> list[str]:
    """The same, with the corpus made."""
    run_prep(compose("prep", corpus))
    return corpus


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """A model of 2 layers; 12 rows a step, which 1, 2 and 3 ranks share out in the same order."""
    return (
        "model.d_model=32",
        "model.n_layers=2",
        "model.ffn_hidden=48",
        "train.seq_len=32",
        "train.global_batch_tokens=384",
        "train.total_tokens=153600",  # 400 steps
        "train.micro_batch=2",
        "train.log_every=50",
        "train.val_every=200",
        "train.val_tokens=300",
        "train.device=cpu",
        "tracker=none",
    )
