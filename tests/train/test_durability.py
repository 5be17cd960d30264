"""scripts/durability.py: its documented lines, and a stall that is measured on this CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("", "kernels", "data_prep", "eval")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("durability", ROOT / "scripts" / "durability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documented_lines_are_parsed(script):
    start = "python scripts/durability.py "
    typed = [
        shlex.split(line.strip().removeprefix(start).replace(" ...", ""))
        for line in script.__doc__.splitlines()
        if line.strip().startswith(start)
    ]
    stall, resize = map(script.parse, [shlex.split("stall --out X -- a=b c=d"), typed[1]])
    assert (stall.part, stall.out, stall.ranks) == ("stall", Path("X"), [1])
    assert stall.overrides == ["a=b", "c=d"]
    assert (resize.part, resize.ranks, resize.stop_at) == ("resize", [2, 1], [0.5])
    assert resize.overrides == ["experiment=books_124m"]
    assert script.parse(["stall", "--out", "X"]).overrides == []
    documented = typed[0]
    documented[documented.index("[--ranks") : documented.index("1]") + 1] = ["--ranks", "1"]
    assert script.parse(documented).overrides == ["experiment=books_124m"]


def test_override_before_the_dashes_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["stall", "--out", "X", "a=b"])
    assert "unrecognized arguments: a=b" in capsys.readouterr().err


def save_line(step: int, stall: float, end: float) -> dict:
    waits = {"stall_seconds": stall, "end_wait_seconds": end}
    return {"kind": "save", "step": step, **waits, "bytes": 2**30, "bytes_per_second": 2.0**30}


def test_wait_at_the_end_is_no_stall(script):
    metrics = [{"kind": "train", "step": s, "step_seconds": 0.5} for s in range(2, 11)]
    metrics += [save_line(4, 0.1, 0.0), save_line(8, 0.2, 1.0), save_line(10, 0.125, 6.0)]
    row = script.stall_row(metrics, 10)
    assert row["saves_in_training"] == 2
    assert row["stall_seconds"] == pytest.approx(0.15)
    assert row["largest_stall_seconds"] == 0.2
    assert row["stall/step"] == pytest.approx(0.3)
    assert row["end_seconds"] == 7.125
    with pytest.raises(SystemExit, match=r"lower train\.save_every"):
        script.stall_row(metrics[:9] + metrics[-1:], 10)


def test_stall_of_a_small_training(script, corpus, small, tmp_path, monkeypatch):
    path = os.pathsep.join(str(ROOT / package) for package in PACKAGES)
    for name, value in {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    typed = ["stall", "--out", str(tmp_path), "--", *corpus, *small, "train.log_every=1"]
    monkeypatch.setattr("sys.argv", ["durability.py", *typed])
    assert script.main() == 0
    rows = json.loads((tmp_path / "stall.json").read_text())
    assert [row["async_save"] for row in rows] == [True, False]
    for row in rows:
        assert row["saves_in_training"] == 2
        assert 0 < row["stall_seconds"] <= row["largest_stall_seconds"]
        assert row["end_seconds"] > 0
