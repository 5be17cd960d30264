"""scripts/soak.py resume: a sampled matrix of trainings that are stopped and continued.

Every mixer once as it was, bit for bit: weights, optimizer, random generators, losses, samples,
schedule, validations. Every ZeRO stage through 1, 2, 3 and 4 ranks in some order, and one training
through stages too: the same samples, and losses equal to rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SEED = 0
sys.path.insert(0, str(SCRIPTS))
from soak import resume  # noqa: E402

sys.path.remove(str(SCRIPTS))
CHAINS = resume.sample(SEED)


def run_script(*arguments: object, before: str = "") -> tuple[int, str]:
    """scripts/soak.py in a process of its own; before: code that runs in it first."""
    code = f"""
import runpy, sys
sys.path[:0] = {[str(ROOT / package) for package in ("", "kernels", "data_prep", "eval")]!r}
sys.argv = {["soak.py", *map(str, arguments)]!r}
{before}
runpy.run_path({str(SCRIPTS / "soak.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    return done.returncode, done.stdout + done.stderr


def read_rows(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / "resume.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("resume")
    typed = ["resume", "report", "--sample", "--seed", SEED, "--out", out, "--work", out / "work"]
    code, output = run_script(*typed)
    found = read_rows(out)
    assert found.keys() == {chain.name for chain in CHAINS}, output
    assert code == (not all(row["equal"] for row in found.values())), output
    assert f"{len(CHAINS)} trainings, " in (out / "tables.md").read_text()
    return found


def test_sample_covers_what_it_must():
    same = [chain.legs[0] for chain in CHAINS if chain.same]
    changing = [chain.legs for chain in CHAINS if not chain.same]
    assert sorted(leg.mixer for leg in same) == sorted(resume.mixer_names())
    assert {leg.stage for leg in same} == {leg.ranks - 1 for leg in same} == {0, 1, 2, 3}
    for axis in ("channel", "stack", "objective", "optimizer"):
        assert {getattr(leg, axis) for leg in same} == set(resume.DECKS[axis]), axis
    every = [leg for chain in CHAINS for leg in chain.legs]
    assert all(leg.validation and leg.micro_steps > 1 for leg in every)
    assert all(sorted(leg.ranks for leg in legs) == [1, 2, 3, 4] for legs in changing)
    stages = [tuple(leg.stage for leg in legs) for legs in changing]
    assert stages[:4] == [(stage,) * 4 for stage in range(4)]
    assert len(set(stages[4])) > 1
    names = {chain.name for chain in resume.matrix(SEED)}
    assert len(names) == 9 * len(resume.mixer_names())


@pytest.mark.slow
@pytest.mark.parametrize("name", [chain.name for chain in CHAINS])
def test_continues(rows, name):
    assert rows[name]["problems"] == []


@pytest.mark.slow
def test_moment_forgotten_on_other_ranks_is_noticed(tmp_path):
    """The tolerance of a move is tight: first moments that are not restored show."""
    forgets = """
from llmtrain.checkpoint import FragmentReader
read_all = FragmentReader.read_all
def forgetful(self, wanted, *rest):
    return read_all(self, [each for each in wanted if each.kind != "exp_avg"], *rest)
FragmentReader.read_all = forgetful
"""
    name = next(c.name for c in CHAINS if not c.same and c.legs[0].optimizer == "adamw")
    typed = ["resume", "--sample", "--seed", SEED, "--out", tmp_path, "--cases", name]
    code, output = run_script(*typed, before=forgets)
    assert code == 1, output
    assert any("loss differs" in problem for problem in read_rows(tmp_path)[name]["problems"])
