"""The commands one after another, as a user types them: text, corpus, run, continuation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from llmtrain import config
from llmtrain.continuation import continuations

SMALL = ["model=tiny", "model.d_model=32", "model.n_layers=2", "model.ffn_hidden=48"]
RUN = ["train.seq_len=64", "train.global_batch_tokens=256", "train.total_tokens=1024"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which a small corpus was prepared and a run of four steps was made."""
    root = tmp_path_factory.mktemp("commands")
    (root / "text").mkdir()
    for i in range(8):
        lines = [f"line {j} of text {i}: {i * j} and {i + j}" for j in range(40)]
        (root / "text" / f"{i}.txt").write_text("\n".join(lines))
    data = ["data=text", "tokenizer.vocab_size=300"]
    prepared = llmtrain(root, "prep", *data, "data.sources.text.root=text", "data.val_fraction=0.3")
    assert prepared.returncode == 0, prepared.stderr
    trained = llmtrain(root, "train", *data, *SMALL, *RUN, "tracker=none", "name=small")
    assert trained.returncode == 0, trained.stderr
    return root


def llmtrain(cwd, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llmtrain.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_run_holds_its_configuration(folder):
    saved = config.load(folder / "runs" / "small")
    assert saved["model"]["d_model"] == 32
    assert saved["choices"]["data"] == "text"
    assert saved["overrides"][-1] == "name=small"
    steps = (folder / "runs" / "small" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]


def test_generate(folder):
    typed = ["prompt=[line 1, line 2]", "samples=2", "max_new_tokens=5", "seed=3"]
    made = config.compose("generate", [f"checkpoint={folder}/runs/small", *typed])
    texts = continuations(made)
    assert [prompt for prompt, _ in texts] == ["line 1", "line 1", "line 2", "line 2"]
    assert all(text for _, text in texts)
    assert continuations(made) == texts


def test_generate_within_the_context(folder):
    typed = [f"checkpoint={folder}/runs/small", "max_new_tokens=5000"]
    with pytest.raises(ValueError, match=r"max_new_tokens: got 5000 .* expected at most 2048"):
        continuations(config.compose("generate", typed))


def test_another_tokenizer_than_the_corpus(folder):
    wrong = llmtrain(folder, "train", "data=text", "tokenizer.vocab_size=400", *SMALL, *RUN)
    assert wrong.returncode == 2
    assert (
        "tokenizer.vocab_size=400: got tokenizer vocab_size=400, but data/text was made with"
        in (wrong.stderr)
    )


def test_dry_run_plans_and_stops(folder):
    done = llmtrain(folder, "train", "data=text", *SMALL, *RUN, "name=dry", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "run: 4 steps of 4 rows = 1,024 tokens" in done.stdout
    assert not (folder / "runs" / "dry" / "checkpoints").exists()
