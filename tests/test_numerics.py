"""scripts/numerics.py on short rows: errors are rounding, tables go between their markers."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "numerics.py"


@pytest.fixture(scope="module")
def numerics():
    spec = importlib.util.spec_from_file_location("numerics", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(tmp_path, numerics):
    document, found = tmp_path / "numerics.md", tmp_path / "numerics.json"
    document.write_text((ROOT / "docs" / "numerics.md").read_text())
    command = [sys.executable, SCRIPT, "--device", "cpu", "--only", "attention", "mamba2"]
    command += ["--short", "96", "--long", "160", "--gate-tokens", "70"]
    command += ["--json", found, "--document", document]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    facts = json.loads(found.read_text())
    assert [row["mixer"] for row in facts["errors"]] == ["attention", "mamba2"]
    for row in facts["errors"]:
        for key in ("row", "end", "gradient", "row_bf16_loop", "long_row", "long_end"):
            assert 1e-4 < row[key] < 0.02, (row["mixer"], key)
        assert row["chunked_float64"] < 1e-12
    assert len(facts["gates"]) == len(numerics.CASES)
    assert all(row["finite"] for row in facts["gates"])
    errors = document.read_text().split("<!-- errors -->")[1].split("<!-- /errors -->")[0]
    assert re.search(r"(?m)^\| mamba2 \| \d\.\de-03 \|", errors)


def test_every_mixer_and_operation_is_in_the_tables(numerics):
    every = numerics.names(None)
    found = {path.stem for path in (ROOT / "configs" / "mixer").glob("*.yaml")}
    assert found - set(every) <= {*numerics.ALIASES, *bidirectional(numerics, found)}
    assert {op for op, _, _ in numerics.CASES} == {
        name for name in vars(numerics.Gates) if not name.startswith("_")
    } - {"noise", "qkv", "held"}


def bidirectional(numerics, names):
    targets = {name: numerics.target(numerics.node(name), name) for name in names}
    return {name for name, made in targets.items() if not made.causal}


def test_pieces_are_the_row(numerics, monkeypatch):
    """The reference at the long length: states handed on every few tokens change nothing."""
    monkeypatch.setattr(numerics, "PIECE", 7)
    mixer = numerics.build("mamba2", torch.float64, torch.device("cpu"))
    x_BTD = numerics.noise(30, 0, torch.device("cpu"))
    whole_BTD, _ = mixer(x_BTD, numerics.context(mixer, 30, x_BTD.device))
    torch.testing.assert_close(numerics.in_pieces(mixer, x_BTD), whole_BTD, rtol=1e-10, atol=1e-10)


def test_relative_error_and_markers(numerics):
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert numerics.relative(exact.float() + torch.tensor([0.0, 0.5]), exact) == 0.1
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert numerics.put(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="expected both"):
        numerics.put(text, "y", "new")
