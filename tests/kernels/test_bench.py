"""Benchmarks, tried on the CPU: they time nothing that they have not checked."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmtrain_kernels.attention import attention

SCRIPT = Path(__file__).parents[2] / "kernels" / "bench" / "attention.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_script(tmp_path):
    out = tmp_path / "new" / "rows.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--repeats", "1"]
    command += ["--only", "auto", "varlen", "--out", out]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())["rows"]
    checks = [row for row in rows if row.get("check") == "auto"]
    assert len(checks) == 6
    assert all(row["good"] for row in checks)
    assert {row["check"] for row in rows if "check" in row} >= {"cache, 1 tokens", "varlen"}
    assert all(row["both_ms"] > 0 for row in rows if row.get("time") == "auto")
    assert all("on CUDA" in row["error"] for row in rows if row.get("time") == "varlen")
    assert "of floor" not in ran.stdout  # no peaks are known for this device


def test_slstm_script(tmp_path):
    command = [sys.executable, SCRIPT.with_name("slstm.py"), "--repeats", "1"]
    subprocess.run([*command, "--out", tmp_path / "rows.json"], capture_output=True, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["good"] for row in rows if "check" in row)
    assert {row["time"] for row in rows if "time" in row} >= {"loop"}


def test_wrong_results_are_caught(bench):
    wrong = bench.Contender(name="wrong", call=functools.partial(attention, causal=False), checks=2)
    rows = list(bench.run_checks([wrong], bench.QUICK_CHECKED, torch.device("cpu"), torch.float32))
    assert [row["good"] for row in rows] == [False, False]
    assert "WRONG" in bench.line(rows[0])


def test_what_raises_is_reported(bench):
    def fails(q, k, v, **arguments):
        raise RuntimeError("no kernel\nsecond line")

    broken = bench.Contender(name="broken", call=fails, checks=1)
    device = torch.device("cpu")
    (row,) = bench.run_checks([broken], bench.QUICK_CHECKED, device, torch.float32)
    assert (row["good"], row["error"]) == (False, "RuntimeError: no kernel")
    (row,) = bench.run_times([broken], bench.QUICK_TIMED[:1], device, torch.float32, None, 1)
    assert row["error"] in bench.line(row)


def test_floor_is_what_cost_allows(bench):
    shape = bench.TIMED[0]
    x = bench.make(bench.QUICK_TIMED[0], torch.device("cpu"), torch.bfloat16)
    floor = bench.floors(bench.QUICK_TIMED[0], x, (1e12, 1e30))
    pairs = 12 * 128 * 129 // 2
    assert floor["forward_floor_ms"] == pytest.approx(4 * 64 * pairs / 1e9)
    assert floor["both_floor_ms"] == pytest.approx(14 * 64 * pairs / 1e9)  # 4 + 8 + 2 recomputed
    row = {"time": "x", "shape": str(shape), "forward_ms": 2.0, "both_ms": 4.0}
    row |= {"forward_floor_ms": 1.0, "both_floor_ms": 1.0}
    assert "50% of floor" in bench.line(row)
    assert "25% of floor" in bench.line(row)
