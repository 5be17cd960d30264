"""The commands one after another, as a user types them: text, corpus, run, continuation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llmtrain import cli, config
from llmtrain.checkpoint import load_model
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
    # without the ranks and the port of a training in this process
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-m", "llmtrain.cli", *arguments],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
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


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run, whose checkpoints a test may damage."""
    return shutil.copytree(folder / "runs" / "small", tmp_path / "small")


def test_checkpoint_list_and_verify(run, capsys):
    assert cli.main(["checkpoint", "list", f"run_dir={run}"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    step, *_, ranks, state = line.split()
    assert (step, ranks, state) == ("4", "1", "complete")
    assert cli.main(["checkpoint", "verify", f"run_dir={run}"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("step-00000004: good")

    path = run / "checkpoints" / "step-00000004"
    for name in ("rank-00000.safetensors", "tokenizer.json"):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    assert cli.main(["checkpoint", "list", f"run_dir={run}"]) == 0  # content is not read
    assert "complete" in capsys.readouterr().out
    for where in (f"run_dir={run}", f"checkpoint={path}"):
        assert cli.main(["checkpoint", "verify", where]) == 1
        first, *found = capsys.readouterr().out.splitlines()
        assert first == f"{path}: damaged"
        assert {line.split()[0] for line in found} == {"rank-00000.safetensors", "tokenizer.json"}
    (path / "config.yaml").unlink()
    assert cli.main(["checkpoint", "list", f"run_dir={run}"]) == 0
    assert "damaged: file config.yaml is missing" in capsys.readouterr().out


def test_checkpoint_consolidate(run, tmp_path, capsys):
    expected = load_model(run).model.state_dict()
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype / "model.safetensors"
        typed = ["checkpoint", "consolidate", f"checkpoint={run}", f"out={out}", f"dtype={dtype}"]
        assert cli.main(typed) == 0
        stored = load_file(out)
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            kept = tensor.to(torch.bfloat16) if dtype == "bf16" else tensor
            assert torch.equal(stored[name], kept)
            assert stored[name].dtype == kept.dtype
        beside = {"config.yaml", "tokenizer.json", "token_bytes.npy", "model.safetensors"}
        assert {file.name for file in out.parent.iterdir()} == beside
        assert cli.main(typed) == 2
        assert f"{out} exists and is not overwritten" in capsys.readouterr().err
    out.unlink()
    assert cli.main(typed) == 2
    assert "config.yaml exists and is not overwritten" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "got no action, expected one of list, verify, consolidate"),
        (["lst", "run_dir=x"], "got lst, expected one of list, verify, consolidate"),
        (["list"], "run_dir: no value, expected one for list; add run_dir=..."),
        (["list", "run_dir=nowhere"], "run_dir: got nowhere, which has no checkpoints"),
        (["verify"], "expected either run_dir=<run folder>"),
        (["verify", "run_dir=a", "checkpoint=b"], "expected either run_dir=<run folder>"),
        (["verify", "run_dir=a", "dtype=bf16"], "dtype=bf16: has no effect on `llmtrain checkpo"),
        (["consolidate", "checkpoint=a"], "out: no value, expected one for consolidate"),
        (["consolidate", "checkpoint=a", "out=b.pt"], "expected a file name that ends in .safete"),
        (["list", "run_dir=x", "model=tiny"], "`llmtrain checkpoint` takes no groups"),
    ],
)
def test_checkpoint_mistakes(typed, message, capsys):
    assert cli.main(["checkpoint", *typed]) == 2
    assert message in capsys.readouterr().err
