"""What else happens to jobs: cancelled, refused, on bad nodes, in sweeps and chains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llmtrain import checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


SHORT = 12


@pytest.fixture(scope="module")
def short(tiny) -> tuple[str, ...]:
    """After tiny: a training of 12 steps."""
    (rows,) = (int(key.partition("=")[2]) for key in tiny if "global_batch" in key)
    return (f"train.total_tokens={SHORT * rows}",)


def test_what_cannot_run_is_refused_at_submission(slurm, prepared, tiny, tmp_path):
    def refused(*arguments: str) -> str:
        run_dir = f"run_dir={tmp_path / 'run'}"
        return slurm.run("llmtrain", "launch", *arguments, run_dir, *prepared, *tiny, ok=False)

    before = slurm.jobs()
    said = refused("partition=hihg")
    assert "partition: got 'hihg'" in said
    assert "low, high. Did you mean 'high'?" in said
    assert "Traceback" not in said
    assert "nodes: got 6, expected at most 3" in refused("partition=low", "nodes=6")
    assert slurm.jobs() == before
    assert not list(tmp_path.rglob("job.sbatch"))


# What makes the quickstart's training one of seconds.
SMALLER = {
    "prep": ["data.sources.stdlib.patterns=[json/*.py]", "data.sources.stdlib.topics=false"],
    "launch": ["train.total_tokens=327680"],  # 160 steps: more than three commands take
}


def quickstart() -> list[str]:
    """The command lines of docs/slurm.md."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    block = re.search(r"## Quickstart\n```\n(.*?)```", text, re.DOTALL).group(1)
    return [line.partition(" #")[0].strip() for line in block.splitlines()]


def test_quickstart_of_the_document(slurm, tmp_path):
    prep, launch, status, logs, scancel, again = quickstart()
    run_dir = tmp_path / "runs" / "first"

    def typed(line: str, *smaller: str, ok: bool = True) -> str:
        return slurm.run(*shlex.split(line), *smaller, cwd=tmp_path, ok=ok)

    typed(prep, *SMALLER["prep"], "data.val_fraction=0.3")
    first = slurm.job_of(typed(launch, *SMALLER["launch"]))
    slurm.at_step(run_dir, 3)
    assert re.search(rf"first +running .* {first} ", typed(status))
    assert re.search(f"run_dir: .* job {first} already", typed(launch, ok=False))
    typed(scancel.replace("1234", str(first)))
    assert slurm.wait_for(first, "CANCELLED")["Restarts"] == "0"
    ((step, path),) = checkpoint.list_checkpoints(run_dir)
    checkpoint.verify(path)  # saved on Slurm's TERM: no save was due
    assert step >= 3
    assert [line["action"] for line in slurm.decisions(run_dir)] == ["end"]
    assert re.search(rf"first +stopped .* {step} \(", typed(status))

    second = slurm.job_of(typed(again, *SMALLER["launch"]))
    followed = slurm.run("timeout", "--signal=INT", "20", *shlex.split(logs), cwd=tmp_path, ok=None)
    slurm.wait_for(second, "COMPLETED")
    assert f"job {first}, start 0" in followed
    assert f"job {second}, start 0" in followed
    assert [start["resumed_step"] for start in slurm.starts(run_dir)] == [0, step]
    assert slurm.steps(run_dir) == list(range(1, 161))
    assert re.search(r"first +finished +160/160 ", typed(status))


def test_bad_node_is_named_and_left_out(slurm, prepared, tiny, short, tmp_path):
    run_dir = tmp_path / "run"
    slurm.fill_disk("n2")
    typed = ("nodes=2", "partition=low", f"run_dir={run_dir}")
    job = slurm.launch(*typed, *prepared, *tiny, *short)
    slurm.wait_for(job, "COMPLETED", restarts=1, timeout=150)

    first, second = slurm.decisions(run_dir)
    assert (first["action"], first["cause"], first["exclude"]) == ("requeue", "bad node", ["n2"])
    assert "bad node n2" in first["reason"]
    assert (second["action"], second["nodes"]) == ("done", ["n1", "n3"])
    assert slurm.job(job)["ExcNodeList"] == "n2"
    assert "bad node n2" in slurm.run("llmtrain", "logs", f"run_dir={run_dir}")
    assert slurm.steps(run_dir) == list(range(1, SHORT + 1))


def test_sweep_is_an_array_of_jobs(slurm, prepared, tiny, short, tmp_path):
    run_dir = tmp_path / "sweep"
    typed = ("partition=low", "preflight.enabled=false", f"run_dir={run_dir}")
    job = slurm.launch(*typed, *prepared, *tiny, *short, "sweep.optimizer.lr=[1e-3,3e-4]")
    for task in (0, 1):
        slurm.wait_for(f"{job}_{task}", "COMPLETED", timeout=120)

    status = slurm.run("llmtrain", "status", f"root={run_dir}")
    rates = set()
    for point in ("optimizer.lr-0.001", "optimizer.lr-0.0003"):
        assert slurm.steps(run_dir / point) == list(range(1, SHORT + 1))
        assert re.search(rf"{point} +finished +{SHORT}/{SHORT} ", status)
        first, *_ = slurm.lines(run_dir / point / "ledger.jsonl")
        rates.add(first["lr"])
    assert len(rates) == 2


def test_chain_of_prep_train_and_eval(slurm, corpus, tiny, short, tmp_path):
    run_dir = tmp_path / "run"
    data = [f"data.root={tmp_path / 'data'}" if "data.root" in key else key for key in corpus]
    evaluation = ("eval.tasks=[bits_per_byte]", "eval.bits_per_byte.max_tokens=300")
    typed = ("partition=low", "preflight.enabled=false", "chain=[prep,train,eval]", *evaluation)
    job = slurm.launch(*typed, f"run_dir={run_dir}", *data, *tiny, *short)
    slurm.wait_for(job + 1, "COMPLETED", timeout=150)

    assert [slurm.job(number)["JobState"] for number in (job - 1, job)] == ["COMPLETED"] * 2
    assert slurm.steps(run_dir)[-1] == SHORT
    (result,) = run_dir.rglob("eval/results.json")
    assert json.loads(result.read_text())["bits_per_byte"] is not None
