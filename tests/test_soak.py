"""scripts/soak.py: a sampled kill matrix and damage, and that it notices what it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def soak():
    """The script's modules: its folder is on the path, as it is when the script runs."""
    sys.path.insert(0, str(SCRIPTS))
    import soak
    from soak import cells, checks, folder, moments, results

    sys.path.remove(str(SCRIPTS))
    assert Path(soak.__file__).parent == SCRIPTS / "soak"
    modules = {"cells": cells, "checks": checks, "folder": folder, "moments": moments}
    return type("Soak", (), modules | {"results": results})


def run_script(*arguments: object, before: str = "") -> tuple[int, str]:
    """The script in a process of its own; before: code that runs in it first."""
    code = f"""
import os, runpy, sys
sys.argv = {["soak.py", *map(str, arguments)]!r}
{before}
runpy.run_path({str(SCRIPTS / "soak.py")!r}, run_name="__main__")
"""
    script = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1500)
    return done.returncode, done.stdout + done.stderr


def test_matrix_crosses_mixers_with_stages_and_deals_every_option(soak):
    from llmtrain import groups

    cells = soak.cells.matrix(kills=200, seed=0)
    mixers = groups.options()["mixer"]
    pairs = [(cell.mixer, cell.stage) for cell in cells]
    assert sorted(pairs) == sorted((mixer, stage) for mixer in mixers for stage in range(4))
    assert sum(cell.kills for cell in cells) >= 200
    for axis in ("ranks", "micro_steps", "validation", "channel", "stack", "objective"):
        assert {getattr(cell, axis) for cell in cells} == set(soak.cells.DECKS[axis]), axis
    assert not [cell for cell in cells if cell.stage == 3 and cell.optimizer == "muon"]
    assert soak.cells.matrix(kills=200, seed=0) == cells
    assert soak.cells.matrix(kills=200, seed=1) != cells
    assert len({cell.key for cell in cells[:6]}) == 6
    aims = [aim for i, cell in enumerate(cells) for aim in soak.moments.plan(cell, i, 0)]
    assert {aim.moment for aim in aims} == set(soak.moments.AIMS)
    assert all(aim.victims for aim in aims)


def write_run(soak, folder: Path, steps: range, ledger: list[dict] | None = None) -> Path:
    """A finished run as far as the checks look: checkpoints of random tensors, logs."""
    import hashlib

    draw = np.random.default_rng(0)
    for step in steps:
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        tensors = {f"param|w|{rank}": draw.normal(size=8).astype(np.float32) for rank in range(2)}
        for rank, (key, value) in enumerate(tensors.items()):
            save_file({key: value}, path / f"rank-{rank:05d}.safetensors")
        (path / "trainer.json").write_text(json.dumps({"step": step, "run_id": str(folder)}))
        (path / "config.yaml").write_text(f"run_dir: {folder}\ntrain: {{seed: 1}}\n")
        (path / "tokenizer.json").write_text("{}")
        (path / "token_bytes.npy").write_bytes(b"1")
        files = {
            file.name: {
                "size": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in path.iterdir()
        }
        (path / "manifest.json").write_text(json.dumps({"files": files}))
        (folder / "checkpoints" / "latest").write_text(f"{path.name}\n")
    lines = ledger or [{"step": step, "loss": 1 / step} for step in range(1, max(steps) + 1)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"step": 3, "kind": "train", "loss": 0.5, "step_seconds": draw.random()}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return folder


def test_comparison_sees_one_bit_one_step_one_metric(soak, tmp_path):
    twin = write_run(soak, tmp_path / "twin", range(4, 9, 4))
    run = write_run(soak, tmp_path / "run", range(4, 9, 4))

    def differences() -> str:
        return "; ".join(soak.checks.finished_differences(run, twin, 8))

    assert differences() == ""
    path = run / "checkpoints" / "step-00000008" / "rank-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "rank-00001.safetensors has another hash" in differences()
    assert "checkpoints [4], the twin has [4, 8]" in differences()
    manifest = path.with_name("manifest.json")
    import hashlib

    whole, bad = (hashlib.sha256(b).hexdigest() for b in (content, path.read_bytes()))
    manifest.write_text(manifest.read_text().replace(whole, bad))
    assert "1 of 2 tensors differ: ['rank-00001.safetensors: param|w|1']" in differences()
    path.write_bytes(content)
    manifest.write_text(manifest.read_text().replace(bad, whole))
    assert differences() == ""

    ledger = run / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([*lines[:5], lines[4], *lines[5:]]))
    assert "expected 1 .. 8 once each" in differences()
    ledger.write_text("".join(lines).replace("0.25", "0.25000000000000006"))
    assert "ledger.jsonl, step 4: {'loss': (0.25000000000000006, 0.25)}" in differences()
    ledger.write_text("".join(lines))
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.5", "0.51", 1))
    assert "metrics.jsonl (train), step 3" in differences()
    metrics.write_text((twin / "metrics.jsonl").read_text())
    (run / "checkpoints" / ".tmp-step-00000007").mkdir()
    assert differences().startswith("left over")


def test_reading_is_seen_by_what_is_open(soak, tmp_path):
    run = write_run(soak, tmp_path / "run", range(4, 5))
    reading = soak.folder.reading_checkpoint
    assert not reading([os.getpid()], run)
    with (run / "checkpoints" / "step-00000004" / "rank-00000.safetensors").open("rb"):
        assert reading([os.getpid()], run)
        assert not reading([os.getpid()], tmp_path / "other")
    assert not reading([os.getpid()], run)


def test_invariants_after_a_kill(soak, tmp_path):
    run = write_run(soak, tmp_path / "run", range(4, 13, 4))
    folder = soak.folder.Folder(run)
    before = folder.state()
    check = soak.checks.after_kill
    assert before.good == {4, 8, 12}
    assert check(before, before, 2) == []
    assert check(before, replace(before, good=frozenset({8, 12})), 2) == []
    lost = check(before, replace(before, good=frozenset({12})), 2)
    assert lost == ["good checkpoints lost though among the 2 newest: {8: 'gone'}"]
    gone = check(before, replace(before, good=frozenset(), latest=None), 2)
    assert "no good checkpoint is left" in gone
    assert "latest is gone" in gone
    pointing = replace(before, latest="step-00000016")
    assert check(before, pointing, 2) == [
        "latest names 'step-00000016', which is no good checkpoint"
    ]

    (run / "checkpoints" / "step-00000012" / "trainer.json").unlink()
    torn = folder.state()
    assert torn.bad == {12: "trainer.json is missing"}
    problems = "; ".join(check(before, torn, 2))
    assert "step-00000012 has its final name and is damaged: trainer.json is missing" in problems
    assert "latest names 'step-00000012'" in problems

    left = soak.folder.Leftover(files=(), changed=1)
    once = replace(before, leftovers={".tmp-step-00000016": left})
    assert check(before, once, 2) == []
    later = replace(once, good=before.good | {16})
    assert check(once, later, 3) == [".tmp-step-00000016 outlived the next save"]
    twice = replace(once, leftovers={".tmp-step-00000016": left, ".tmp-step-00000020": left})
    assert "temporary folders pile up" in check(before, twice, 2)[0]
    assert soak.checks.resumed_right(before, replace(before, starts=[{"resumed_step": 8}])) == [
        "a start resumed at step 8, expected 12"
    ]


@pytest.mark.slow
def test_killed_and_damaged_runs_end_as_undisturbed(soak, tmp_path):
    """One cell of two ranks, one damaged checkpoint."""
    typed = ["kill", "damage", "report", "--out", tmp_path, "--work", tmp_path / "work"]
    typed += ["--kills", 3, "--mixers", "attention", "--stages", 1, "--ranks", 2]
    typed += ["--bases", "1:adamw", "--cases", "trainer.json one bit"]
    code, output = run_script(*typed)
    assert code == 0, output
    (row,) = soak.results.read(tmp_path, "kill")
    assert row["equal"]
    assert row["restarts"] == 3
    assert row["cell"]["ranks"] == 2
    (case,) = soak.results.read(tmp_path, "damage")
    assert "trainer.json is damaged" in case["said"]
    assert case["refused"]
    assert "3 kills in 1 cells, 1 of which ended equal" in (tmp_path / "tables.md").read_text()
    assert not list((tmp_path / "work" / "runs").iterdir())


@pytest.mark.slow
def test_sample_of_mixers_and_stages(soak, tmp_path):
    typed = ["kill", "report", "--out", tmp_path, "--work", tmp_path / "work", "--seed", 1]
    code, output = run_script(*typed, "--kills", 16, "--mixers", "gated_deltanet", "mamba2")
    assert code == 0, output
    rows = soak.results.read(tmp_path, "kill")
    assert len(rows) == 8
    assert all(row["equal"] for row in rows)
    assert sum(len(row["kills"]) for row in rows) >= 14


@pytest.mark.slow
def test_trainer_that_forgets_a_moment_is_noticed(soak, tmp_path):
    """The optimizer's first moments are not restored: the twin is another run."""
    forgets = """
import llmtrain.checkpoint as checkpoint
read_all = checkpoint.FragmentReader.read_all
def forgetful(self, wanted, *rest):
    return read_all(self, [each for each in wanted if each.kind != "exp_avg"], *rest)
checkpoint.FragmentReader.read_all = forgetful
"""
    path = [str(SCRIPTS.parent / part) for part in ("", "kernels", "data_prep", "eval")]
    typed = ["kill", "--out", tmp_path, "--work", tmp_path / "work"]
    typed += ["--kills", 2, "--mixers", "attention", "--stages", 1, "--ranks", 1]
    code, _ = run_script(*typed, before=f"sys.path[:0] = {path!r}\n{forgets}")
    assert code == 1
    (row,) = soak.results.read(tmp_path, "kill")
    assert not row["equal"]
    assert any("tensors differ" in problem for problem in row["problems"])
