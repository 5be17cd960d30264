"""The quickstart's summary: from the files that its stages leave, also when it is run again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_dir(tmp_path):
    """A finished run that was started again: its last start took no step, so it has no rate."""
    entries = [{"kind": "train", "tokens_per_second": rate} for rate in (100.0, 300.0, 200.0)]
    entries.append({"kind": "val", "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (tmp_path / "summary.json").write_text(json.dumps({"finished": True, "step": 7}))
    bits = {"model": 1.5, "trigram": 1.7, "bigram": 2.1, "unigram": 3.3}
    results = {
        "bits_per_byte": {name: {"bits_per_byte": value} for name, value in bits.items()},
        "passkey": {
            "generate_accuracy": 0.25,
            "likelihood_accuracy": 0.5,
            "chance": {"generate": 0.0, "likelihood": 0.1},
        },
        "tasks": {"next_line": {"acc_norm": 0.4}},
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_summary_is_the_same_when_run_again(quickstart, run_dir):
    first = quickstart.summarise(run_dir, {"train": 3.21})
    assert first["bits_per_byte"] == {"model": 1.5, "trigram": 1.7, "bigram": 2.1, "unigram": 3.3}
    assert first["tokens_per_s"] == 200.0
    assert first["training"] == {"finished": True, "step": 7}
    assert first["passkey"]["likelihood_chance"] == 0.1
    (run_dir / "summary.json").write_text(json.dumps(first))
    assert quickstart.summarise(run_dir, {"train": 3.21}) == first


def test_report_shows_figures_and_places(quickstart, run_dir, monkeypatch):
    monkeypatch.setattr(quickstart, "ROOT", run_dir.parent)
    summary = quickstart.summarise(run_dir, {"train": 3.0})
    text = quickstart.report(summary, run_dir, run_dir / "corpus")
    for part in ("model     1.500", "trigram   1.700", "200", "next_line: 0.40", "metrics.jsonl"):
        assert part in text


def test_commands_are_shown_as_typed(quickstart):
    plain = quickstart.command("train", "experiment=quickstart")
    ranks = quickstart.command("train", "experiment=quickstart", ranks=2)
    assert quickstart.shown(plain) == "llmtrain train experiment=quickstart"
    assert quickstart.shown(ranks).startswith(
        "torchrun --standalone --nproc-per-node=2 -m llmtrain"
    )


def test_failed_stage_says_how_to_go_on(quickstart):
    with pytest.raises(SystemExit, match=r"'nothing' ended with exit code 2.*quickstart-fresh"):
        quickstart.stage("nothing", quickstart.command("no-such-command"), 1)
