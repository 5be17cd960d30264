"""The benchmarks' harness: it must notice a wrong kernel, and report what it says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmtrain_kernels.bench import harness
from llmtrain_kernels.bench.case import Case
from llmtrain_kernels.bench.floor import Floor, measure
from llmtrain_kernels.bench.kernels import KERNELS
from llmtrain_kernels.cost import Cost

CPU, FLOOR = torch.device("cpu"), Floor(bytes_per_second=1e9, flops_per_second=1e10)
ROOT = Path(__file__).parents[2]


def make(device, dtype):
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(3, 5, generator=generator).to(device, dtype).requires_grad_()}


def case(**changes):
    cost = Cost(flops=0.0, bytes_read=60, bytes_written=60)
    given = {
        "kernel": "square",
        "shape": "N3 D5",
        "make": make,
        "ours": lambda x: x * x,
        "reference": lambda x: x**2,
        "peers": {"other": lambda: lambda x: (x.abs() * x.abs(),)},
        "costs": (cost, cost + cost),
    }
    return Case(**{**given, **changes})


def absent():
    raise ImportError("no such peer")


def test_row_of_a_right_kernel():
    row = harness.run(case(), CPU, torch.float32, FLOOR)
    assert (row["kernel"], row["shape"]) == ("square", "N3 D5")
    assert row["ours"]["rel_err"] < 1e-7
    assert row["floor"] == {"fwd_ms": pytest.approx(1.2e-4), "fwdbwd_ms": pytest.approx(3.6e-4)}
    assert row["ours"]["fwd_ms"] > 0
    assert set(row["peers"]) == {"other"}
    assert harness.wrong(row, 1e-6) is None
    assert len(list(harness.lines(row))) == 3


@pytest.mark.parametrize("ours", [lambda x: x * x.detach(), lambda x: x * x * 1.01])
def test_wrong_gradients_and_wrong_values_are_named(ours):
    row = harness.run(case(ours=ours), CPU, torch.float32, FLOOR)
    assert "relative error" in harness.wrong(row, 1e-6)
    assert harness.wrong(row, 1.0) is None


def test_what_fails_is_reported_and_not_timed():
    row = harness.run(case(ours=lambda x: x @ x), CPU, torch.float32, FLOOR)
    assert harness.wrong(row, 1.0).startswith("RuntimeError: ")
    row = harness.run(case(peers={"absent": absent}), CPU, torch.float32, FLOOR)
    assert row["peers"]["absent"] == {"error": "ImportError: no such peer"}
    assert harness.wrong(row, 1e-6) is None


def test_not_a_number_is_wrong():
    row = harness.run(case(ours=lambda x: x * x * float("nan")), CPU, torch.float32, FLOOR)
    assert harness.wrong(row, 1e-6) is not None


def test_peers_allow_what_they_err_themselves():
    row = {"ours": {"rel_err": 1.05e-3}, "peers": {"a": {"rel_err": 1e-3}, "b": {"error": ""}}}
    assert harness.wrong(row, 1e-6) is None
    row["ours"]["rel_err"] = 1.2e-3
    assert harness.wrong(row, 1e-6) is not None


def test_floor_is_measured():
    floor = measure(CPU, copied=2**16, side=64)
    assert floor.bytes_per_second > 0
    assert floor.flops_per_second > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_script(tmp_path, kernel):
    """Every kernel's cases, in tiny sizes."""
    command = [sys.executable, ROOT / "kernels/bench/dense.py", "--out", tmp_path, "--only", kernel]
    ran = subprocess.run(
        [*command, "--no-peers", "--device", "cpu"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())
    cases = importlib.import_module(f"llmtrain_kernels.bench.{kernel}").cases(quick=True)
    limits = {(case.kernel, case.shape): case.error or 1e-5 for case in cases}
    errors = {(row["kernel"], row["shape"]): row["ours"]["rel_err"] for row in rows}
    assert set(errors) == set(limits)
    assert all(errors[named] < limit for named, limit in limits.items())
    assert set(json.loads((tmp_path / "machine.json").read_text())) > {"device", "bytes_per_second"}
