"""scripts/plot_runs.py: curves as a table, on what two runs share."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_runs.py"


@pytest.fixture(scope="module")
def plot_runs():
    spec = importlib.util.spec_from_file_location("plot_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, values, *, step=1_000_000):
    lines = [
        {"kind": "train", "tokens": step * (i + 1), "bits_per_byte": value}
        for i, value in enumerate(values)
    ]
    lines.append({"kind": "val", "tokens": step, "bits_per_byte": 1.5})
    lines.append({"kind": "event", "what": "no curve"})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_table(plot_runs, tmp_path):
    one = plot_runs.read(write(tmp_path / "a", [2.0 - i / 20 for i in range(20)]))
    two = plot_runs.read(write(tmp_path / "b", [2.0 - i / 20 + 0.25 for i in range(25)]))
    assert one["val"] == [(1.0, 1.5)]
    title, _, *rows = plot_runs.table({"a": one["train"], "b": two["train"]})
    assert title == "| million tokens | a | b | b - a |"
    assert len(rows) == 10
    assert rows[0] == "| 1.00 to 2.00 | 1.9750 | 2.2250 | +0.2500 |"
    assert rows[-1].startswith("| 19.00 to 20.00 |")


def test_what_was_made_again_counts_as_made_last(plot_runs, tmp_path):
    path = write(tmp_path / "a", [3.0, 2.0, None])
    again = {"kind": "train", "tokens": 2_000_000, "bits_per_byte": 2.5}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    assert plot_runs.read(path)["train"] == [(1.0, 3.0), (2.0, 2.5)]


def test_nothing_in_common(plot_runs, tmp_path):
    one = plot_runs.read(write(tmp_path / "a", [1.0]))
    two = plot_runs.read(write(tmp_path / "b", [1.0], step=7))
    with pytest.raises(ValueError, match=r"without a number of tokens in common"):
        list(plot_runs.table({"a": one["train"], "b": two["train"]}))
