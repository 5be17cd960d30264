"""`llmtrain bench` at toy size on a CPU: real processes, real JSON."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from llmtrain_kernels.bench.case import Case
from llmtrain_kernels.cost import Cost

from llmtrain import cli
from llmtrain.bench import kernels, step
from llmtrain.bench.contender import CONTENDERS, absent
from llmtrain.bench.corpus import write_random
from llmtrain.bench.entries import ENTRIES, QUICK
from llmtrain.config import compose
from llmtrain.data.loader import TokenLoader


@pytest.fixture
def read(tmp_path):
    return lambda name: json.loads((tmp_path / name).read_text())


def bench(tmp_path, *words):
    return cli.main(["bench", *words, f"out={tmp_path}", "device=cpu"])


def test_step_of_ours_and_the_bare_loop(tmp_path, read, capsys):
    typed = ("quick=true", "only=[tiny_1layer]", "contenders=[ours,bare,hf_liger]", "intervals=1")
    assert bench(tmp_path, "step", *typed) == 0
    (row,) = read("step.json")
    assert (row["model"], row["T"], row["micro_batch"]) == ("tiny_1layer", 32, 2)
    for found in (row["ours"], row["bare_loop"]):
        assert found["tokens_per_s"] == pytest.approx(128 / found["step_seconds"])
        assert found["first_step_s"] > 0 < found["peak_gib"]
        assert found["params"] == row["params"]
        assert found["fp32_masters"]
        assert found["mfu"] is None
    assert "model and engine" in row["ours"]["first_step_parts"]
    assert row["bare_loop_tokens_per_s"] == row["bare_loop"]["tokens_per_s"]
    if absent("hf_liger"):
        assert row["peers"]["hf_liger"]["error"] == "absent: liger_kernel is not installed"
    assert "over the bare loop" in capsys.readouterr().out
    assert set(read("machine.json")) == {"device", "versions", "commit"}


@pytest.mark.slow
def test_step_of_hugging_face(tmp_path, read):
    typed = ("quick=true", "contenders=[hf_compile,hf_compile_fp32]", "intervals=1")
    assert bench(tmp_path, "step", *typed) == 0
    for row in read("step.json"):
        for name, peer in row["peers"].items():
            assert peer["params"] == row["params"], name
            assert peer["fp32_masters"] == name.endswith("_fp32")
    assert set(row["layer_ms"]) == {"hf_compile", "hf_compile_fp32"}


def test_a_spent_budget_and_a_failure_are_told(tmp_path, read):
    typed = ("quick=true", "only=[tiny_1layer]", "contenders=[ours]")
    assert bench(tmp_path, "step", *typed, "budget=0") == 0
    assert read("step.json")[0]["ours"] == {"error": "left out: the budget was spent"}
    assert bench(tmp_path, "step", *typed, 'changes=["model.n_layers=0"]') == 0
    assert "model.n_layers: got 0" in read("step.json")[0]["ours"]["error"]
    assert bench(tmp_path, "step", *typed, "limit=0.1") == 0
    assert read("step.json")[0]["ours"] == {"error": "no result within 0 s"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "got no action, expected one of step, data, kernels"),
        (["bench", "steps"], "got steps, expected one of step, data, kernels"),
        (["bench", "data", "limit=3"], "limit=3: has no effect on `llmtrain bench data`"),
        (["bench", "step", "only=[7b]"], "only: got '7b', expected some of 1.26b, 124m"),
        (["bench", "step", "contenders=[me]"], "contenders: got 'me', expected some of ours, bare"),
    ],
)
def test_what_is_mistyped(words, said, capsys, tmp_path):
    assert cli.main([*words, f"out={tmp_path}"] if len(words) > 1 else words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("entry", [*ENTRIES, *QUICK], ids=lambda entry: entry.name)
def test_entries_compose(entry):
    facts = entry.facts(entry.config(precision="bf16", compile_mode="blocks"))
    expected = {"1.26b": 1_264_000_000, "124m": 100_000_000, "350m": 317_000_000}
    if entry.name in expected:
        assert facts["params"] == pytest.approx(expected[entry.name], rel=0.05)
    assert facts["flops_per_token"] > 3 * facts["params"]
    if entry.layers_of:
        assert entry.layers_of in {other.name for other in (*ENTRIES, *QUICK)}


def test_mfu_of_the_goal():
    """72k tokens/s of the 1.26B model on an H100 is what the issue calls 61 %."""
    from llmtrain.accounting import mfu

    entry = ENTRIES[0]
    facts = entry.facts(entry.config(precision="bf16", compile_mode="blocks"))
    share = mfu(72_000, facts["flops_per_token"], "NVIDIA H100 80GB HBM3")
    assert share == pytest.approx(0.61, abs=0.02)


def test_cost_of_a_layer():
    entries = {entry.name: entry for entry in QUICK}
    rows = [
        {
            "model": name,
            "micro_steps": 2,
            "ours": {"step_seconds": seconds},
            "peers": {"hf_liger": {"error": "absent"}},
        }
        for name, seconds in (("tiny_1layer", 0.1), ("tiny_3layers", 0.5))
    ]
    step.layer_costs(rows, entries)
    assert rows[1]["layer_ms"] == {"ours": pytest.approx(100.0)}
    assert "layer_ms" not in rows[0]


def test_random_corpus_is_a_corpus(tmp_path):
    write_random(tmp_path / "random", vocab_size=70_000, tokens=5_000)
    loader = TokenLoader.open(tmp_path / "random", "train", seq_len=64, seed=0)
    batch = loader.batch(0, 64)
    assert loader.vocab_size == 70_000 > batch.tokens_BT.max() > 60_000
    assert batch.doc_starts_BT.any()


def test_data(tmp_path, read):
    assert bench(tmp_path, "data", "quick=true") == 0
    found = read("data.json")
    assert len(found["loader"]) == 2
    assert all(row["prepared_tokens_per_s"] > 0 for row in found["loader"])
    one, _ = found["needs"]
    assert one["tokens_per_s"] == pytest.approx(72_000, rel=0.04)


def double(x):
    return 2 * x


def cases(quick):
    assert quick
    reading = Cost(flops=0.0, bytes_read=64.0, bytes_written=64.0)
    options = {
        "kernel": "double",
        "shape": "16",
        "make": lambda device, dtype: {"x": torch.ones(16, dtype=dtype, requires_grad=True)},
        "reference": double,
        "costs": (reading, reading),
    }
    wrong = Case(ours=lambda x: 2.1 * x, **options)
    return [Case(ours=double, peers={"peer": lambda: double}, **options), wrong]


def test_kernels(tmp_path, read, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "KERNELS", ("double",))
    monkeypatch.setitem(sys.modules, "llmtrain_kernels.bench.double", SimpleNamespace(cases=cases))
    assert bench(tmp_path, "kernels", "peers=false") == 1
    good, wrong = read("kernels.json")
    assert good["ours"]["rel_err"] == 0 < wrong["ours"]["rel_err"]
    assert good["peers"] == {}
    assert good["floor"]["fwd_ms"] > 0
    assert "WRONG: double 16: relative error" in capsys.readouterr().out
    assert bench(tmp_path, "kernels", "budget=0") == 0
    assert read("kernels.json") == []


def test_contenders_are_those_of_the_configuration():
    assert compose("bench", ["action=step"])["contenders"] == list(CONTENDERS)
