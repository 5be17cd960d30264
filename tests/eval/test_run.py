"""`llmtrain eval` from a checkpoint to results, alone and on two ranks; and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llmtrain_data.prepare import prepare
from llmtrain_data.sources import LocalFiles
from llmtrain_data.tokenizer import Bpe, Existing
from llmtrain_eval.run import run_eval

from llmtrain import checkpoint

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = (
    "tasks=[bits_per_byte,ngram,passkey,next_line]",
    "passkey.lengths=[112,150]",
    "passkey.depths=[0.0,1.0]",
    "passkey.samples=2",
    "next_line.items=10",
    "batch_tokens=500",
)


@pytest.fixture
def evaluate(eval_config):
    """evaluate(run_dir, "tasks=[next_line]"): its results."""
    return lambda run_dir, *changes: run_eval(eval_config(run_dir, *changes))


@pytest.fixture
def no_model(monkeypatch):
    """Errors must come before the model is loaded."""

    def load_model(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(checkpoint, "load_model", load_model)


def test_everything(evaluate, run_dir, tmp_path, capsys):
    results = evaluate(run_dir, *EVERYTHING)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (out / "results.md").read_text()
    assert table.startswith(f"# {run_dir}/checkpoints/step-00000007, step 7\n")
    assert "are longer than the 64 tokens a row" in table
    printed = capsys.readouterr().out
    for name in ("model", "unigram", "bigram", "trigram"):
        one = results["bits_per_byte"][name]
        assert one["bits_per_byte"] == one["bits"] / one["bytes"]
        line = f"| bits_per_byte: {name:7} | bits/byte | {one['bits_per_byte']:.4f} |"
        assert line in printed
        assert line in table
        assert set(one["sources"]) == {"one", "two"}
    # an untrained model knows nothing, bigrams know something
    bits = {name: one["bits_per_byte"] for name, one in results["bits_per_byte"].items()}
    assert bits["bigram"] < bits["unigram"] < bits["model"]

    grid = json.loads((out / "passkey.json").read_text())
    assert grid == results["passkey"]
    assert (grid["lengths"], grid["samples"]) == ([112, 150], 2)
    assert (out / "passkey.png").stat().st_size > 5000
    assert results["tasks"]["next_line"]["samples"] == 10

    manifest = run_dir / "checkpoints" / "step-00000007" / "manifest.json"
    assert results["checkpoint"]["step"] == 7
    assert results["checkpoint"]["path"] == str(manifest.parent)
    assert len(results["checkpoint"]["sha256"]) == 64
    assert results["config"]["batch_tokens"] == 500
    assert results["versions"]["lm_eval"].startswith("0.4")
    assert results["environment"]["ranks"] == 1


def test_two_ranks_give_the_same(evaluate, run_dir, tmp_path):
    """The command line under torchrun, with gloo."""
    alone = evaluate(run_dir, *EVERYTHING, "log_samples=true")
    path = os.pathsep.join(str(ROOT / package) for package in ("", "kernels", "data_prep", "eval"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fixed = (f"checkpoint={run_dir}", f"out={tmp_path / 'two'}", "device=cpu", "log_samples=true")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "llmtrain.cli", "eval", *fixed, *EVERYTHING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["environment"]["ranks"] == 2
    for part in ("bits_per_byte", "passkey", "tasks"):
        assert together[part] == json.loads(json.dumps(alone[part])), part
    for task in ("next_line",):
        file = Path("samples") / f"{task}.jsonl"
        one, two = (tmp_path / "out" / file).read_text(), (tmp_path / "two" / file).read_text()
        assert one == two
    assert done.stdout.count("| bits_per_byte: model") == 1


def test_parts_are_written_as_they_finish(evaluate, run_dir, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("later part")

    monkeypatch.setattr("llmtrain_eval.harness.evaluate", broken)
    with pytest.raises(RuntimeError, match="later part"):
        evaluate(run_dir, "tasks=[bits_per_byte,next_line]")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["bits_per_byte"]["model"]["tokens"] > 0
    assert "tasks" not in results


def test_results_lie_beside_the_checkpoints_by_default(evaluate, make_run):
    run_dir = make_run()
    results = evaluate(run_dir, "tasks=[bits_per_byte]", "out=null", "bits_per_byte.stride=32")
    written = json.loads((run_dir / "eval" / "results.json").read_text())
    assert written["config"] == results["config"]
    evaluate(run_dir, "tasks=[bits_per_byte]", "out=null", "bits_per_byte.stride=16")
    earlier = json.loads((run_dir / "eval" / "previous-1" / "results.json").read_text())
    assert earlier == written


def test_bfloat16(evaluate, run_dir):
    def bits(precision):
        results = evaluate(run_dir, "tasks=[bits_per_byte]", f"precision={precision}")
        return results["bits_per_byte"]["model"]["bits"]

    assert bits("bf16") == pytest.approx(bits("fp32"), rel=0.02)
    assert bits("bf16") != bits("fp32")


def test_depth_of_a_recurrent_model(evaluate, make_run, run_dir, no_model, monkeypatch):
    with pytest.raises(ValueError, match=r"repeats: got 2, but the layers .* applied once"):
        evaluate(run_dir, "tasks=[bits_per_byte]", "repeats=2")
    monkeypatch.undo()
    deep = make_run("stack=recurrent_depth", "model.n_layers=3", "stack.repeats=2")

    def bits(*changes):
        results = evaluate(deep, "tasks=[bits_per_byte]", *changes)
        assert results["config"]["repeats"] == (int(changes[0][-1]) if changes else None)
        return results["bits_per_byte"]["model"]["bits"]

    assert bits() == bits("repeats=2") != bits("repeats=4")


def test_contexts_are_cut_to_a_row_of_training(evaluate, run_dir, make_run, tmp_path):
    """... unless max_length says more; tasks that mind are refused."""
    (tmp_path / "tasks").mkdir()
    items = tmp_path / "items.jsonl"
    item = {"query": "green blue " * 60, "choices": ["a", "b"], "gold": 0}
    items.write_text((json.dumps(item) + "\n") * 3)
    config = {
        "task": "long",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}, "cache_dir": str(tmp_path / "c")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    (tmp_path / "tasks" / "long.yaml").write_text(json.dumps(config))
    options = ("tasks=[long]", f"include_path={tmp_path / 'tasks'}")
    (warning,) = evaluate(run_dir, *options)["warnings"]
    assert warning == "long: 6 requests were cut on the left to fit 64 tokens"
    assert evaluate(run_dir, *options, "max_length=200")["warnings"] == []
    scaled = make_run("position.scaling=linear", "position.factor=4.0")
    assert evaluate(scaled, *options)["warnings"] == []


def test_learned_positions_have_an_end(evaluate, make_run, no_model):
    run_dir = make_run("position=learned", "model.max_seq_len=128")
    with pytest.raises(ValueError, match=r"passkey.lengths: got 150, expected at most 128"):
        evaluate(run_dir, *EVERYTHING)
    with pytest.raises(ValueError, match=r"max_length: got 129, expected at most 128, .*; lower"):
        evaluate(run_dir, "tasks=[next_line]", "max_length=129")


def test_missing_and_damaged_checkpoints(evaluate, make_run, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint .*nowhere: got no manifest.json, expected"):
        evaluate(tmp_path / "nowhere", "tasks=[next_line]")
    run_dir = make_run()
    weights = next(run_dir.glob("checkpoints/*/rank-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"got only damaged checkpoints in this run folder"):
        evaluate(run_dir, "tasks=[next_line]")


def test_tasks_are_loaded_before_the_model(evaluate, run_dir, no_model, tmp_path):
    config = {"task": "far", "dataset_path": "json", "test_split": "test"}
    config["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "missing.jsonl")}}
    (tmp_path / "far.yaml").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="task far: its data set json"):
        evaluate(run_dir, "tasks=[far]", f"include_path={tmp_path}")


def test_corpora_that_do_not_fit(evaluate, run_dir, corpus, no_model, tmp_path):
    with pytest.raises(ValueError, match=r"corpus: got .*gone \(from eval.yaml\).*give corpus=DIR"):
        evaluate(run_dir, "tasks=[ngram,next_line]", f"corpus={tmp_path / 'gone'}")

    shutil.copytree(corpus.parent.parent / "two", tmp_path / "text")
    other = {"sources": {"two": LocalFiles(str(tmp_path / "text"))}, "workers": 1}
    prepare(out_dir=tmp_path / "bpe", tokenizer=Bpe(vocab_size=300), val_fraction=0.5, **other)
    message = r"corpus: .*bpe holds tokens of the tokenizer .*expected the checkpoint's.*existing"
    with pytest.raises(ValueError, match=message):
        evaluate(run_dir, "tasks=[bits_per_byte]", f"corpus={tmp_path / 'bpe'}")


def test_ngrams_of_another_corpus(evaluate, run_dir, corpus, no_model, tmp_path):
    """Bits per byte on other text are fine, n-grams counted on it are not."""
    prepare(
        out_dir=tmp_path / "other",
        sources={"two": LocalFiles(str(corpus.parent.parent / "two"))},
        tokenizer=Existing(path=str(corpus)),
        val_fraction=0.5,
        workers=1,
    )
    with pytest.raises(ValueError, match=r"ngram: .*other is the corpus .* was trained on"):
        evaluate(run_dir, "tasks=[ngram]", f"corpus={tmp_path / 'other'}")
    with pytest.raises(AssertionError, match="the model was loaded"):
        evaluate(run_dir, "tasks=[bits_per_byte]", f"corpus={tmp_path / 'other'}")
