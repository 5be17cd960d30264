"""`llmtrain launch` on a login node without a cluster: what it writes, submits and refuses.

Slurm's programs are stand-ins that print recorded answers and note how they were called.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmtrain import cli, groups
from llmtrain.config import compose, reload
from llmtrain.prep import run_prep
from llmtrain.slurm import snapshot, sweep
from llmtrain.slurm.launch import Typed
from llmtrain.slurm.submission import Submission, submissions
from llmtrain.slurm.write import save

SINFO = "low*|up|1-00:00:00|4|8|64000|(null)\\ngpu|up|infinite|4|96|1000000|gpu:h100:8\\n"
PROGRAMS = {
    "sinfo": f"case \"$*\" in *--Node*) printf 'n1\\nn2\\nn3\\nn4\\n';; *) printf '{SINFO}';; esac",
    "squeue": 'cat "$FAKE/queue"',
    "sbatch": 'echo "$@" >> "$FAKE/calls"; [ -f "$FAKE/refuse" ] && grep -q "$(wc -l < '
    '"$FAKE/calls")" "$FAKE/refuse" && { echo "sbatch: error: invalid account" >&2; exit 1; }; '
    'echo "$((100 + $(wc -l < "$FAKE/calls")))"',
    "scancel": 'echo "scancel $@" >> "$FAKE/calls"',
    "scontrol": "echo n2",
}


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """A folder with the stand-ins' notes: calls; queue is what squeue prints."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, does in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    (folder / "calls").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(scope="module")
def typed(tmp_path_factory) -> list[str]:
    """The overrides of a small training, 12 rows a step, with a corpus that is there."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"some words of text {number}, and then more. " * 60)
    corpus = [
        "data=text",
        f"data.sources.text.root={folder}",
        f"data.root={folder / 'data'}",
        "data.val_fraction=0.2",
        "data.workers=1",
        "tokenizer.vocab_size=280",
    ]
    run_prep(compose("prep", corpus))
    sizes = ["model.d_model=32", "model.n_layers=2", "model.ffn_hidden=48", "tracker=none"]
    steps = ["seq_len=32", "global_batch_tokens=384", "total_tokens=230400", "micro_batch=2"]
    return [*corpus, *sizes, *(f"train.{step}" for step in steps), "train.device=cpu"]


def launched(*arguments: str) -> int:
    return cli.main(["launch", *arguments])


def only_submission(run_dir: Path) -> Submission:
    (folder,) = submissions(run_dir)
    return Submission.load(folder)


def test_a_training_is_submitted(fake_slurm, typed, tmp_path, capsys):
    arguments = ("nodes=2", "min_nodes=1", "time=60", "exclude=[n9]", "name=one", *typed)
    assert launched(*arguments) == 0
    out = capsys.readouterr().out
    base = only_submission(tmp_path / "runs" / "one")
    assert re.search(r"^  total +\d", out, re.MULTILINE)
    assert "memory of each of 2 ranks" in out
    assert out.splitlines()[-2:] == [f"submission  {base.folder}", "job         101 (train)"]
    assert (fake_slurm / "calls").read_text() == f"--parsable {base.path / 'job.sbatch'}\n"
    assert (base.path / "job_id").read_text() == "101\n"
    assert (base.sizes, base.tasks_per_node, base.gpus) == ([2, 1], 1, 0)
    assert base.exclude == ["n9"]
    job = (base.path / "job.sbatch").read_text()
    assert f"exec {sys.executable} -m llmtrain.slurm.batch {base.folder}\n" in job
    assert f"--chdir={tmp_path}\n" in job
    assert "--signal=B:USR2@300\n" in job


def test_the_snapshot_is_what_the_job_runs(fake_slurm, typed, tmp_path):
    """The configuration loads from it as it was resolved, by the copied code alone."""
    launched("name=one", "dry_run=true", *typed, "mixer=mqa", "model.n_heads=2")
    base = only_submission(tmp_path / "runs" / "one")
    config = reload("train", base.config)
    assert config["choices"]["mixer"] == "mqa"
    assert config["train"]["device"] == "cpu"
    assert config == {**compose("train", config["overrides"])}
    assert reload("train", base.restart_config)["train"]["resume"] == "auto"
    says = (
        "import llmtrain, llmtrain_kernels, llmtrain_data, llmtrain_eval; "
        "from llmtrain import groups; from llmtrain.slurm import template; "
        "print(llmtrain.__file__, llmtrain_kernels.__file__, llmtrain_data.__file__, "
        "llmtrain_eval.__file__, groups.config_root(), template.folder(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", says],
        env={**os.environ, "PYTHONPATH": base.code, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(line.startswith(base.code) for line in done.stdout.splitlines())
    facts = json.loads((Path(base.code) / "code.json").read_text())
    assert facts["sha256"] == base.code_sha256 == snapshot.digest(Path(base.code))
    assert (Path(base.code) / "llmtrain" / "configs" / "train.yaml").exists()
    with (Path(base.code) / "llmtrain" / "cli.py").open("a") as file:
        file.write("# an edit\n")
    assert snapshot.digest(Path(base.code)) != base.code_sha256


def test_a_resolved_configuration_is_checked_again(typed, tmp_path, capsys):
    config = compose("train", typed)
    config["train"]["seq_len"] = 7
    save(config, tmp_path / "config.yaml")
    file = str(tmp_path / "config.yaml")
    assert cli.main(["train", "--config", file]) == 2
    assert "expected a multiple of train.seq_len=7" in capsys.readouterr().err
    assert cli.main(["train", "--config", file, "seed=1"]) == 2
    assert "expected a command without overrides" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert cli.main(["train", "--config", file]) == 2
    assert "is no resolved configuration" in capsys.readouterr().err


def test_resume_never_holds_for_the_first_start(fake_slurm, typed, tmp_path):
    launched("name=one", "dry_run=true", *typed, "train.resume=never")
    base = only_submission(tmp_path / "runs" / "one")
    assert yaml.safe_load(base.config.read_text())["train"]["resume"] == "never"
    assert yaml.safe_load(base.restart_config.read_text())["train"]["resume"] == "auto"


def test_a_dry_run_needs_no_slurm(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    gpus = ("nodes=3", "gpus=4", "partition=any", "train.micro_batch=1")
    assert launched("dry_run=true", *without_device(typed), *gpus) == 0
    out = capsys.readouterr().out
    file = re.search(r"by hand: sbatch (\S+)", out).group(1)
    assert "#SBATCH --gpus-per-node=4\n" in Path(file).read_text()
    assert launched("nodes=2", *typed) == 2
    assert "not found on this machine" in capsys.readouterr().err


def without_device(overrides: list[str]) -> list[str]:
    return [text for text in overrides if not text.startswith("train.device")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nodez=2"], "has a key 'nodez', expected one of nodes, min_nodes"),
        (["nodes=2", "tasks_per_node=4"], "got 12 rows of train.seq_len=32, expected a multiple"),
        (["nodes=4"], "nodes=4: train.global_batch_tokens: got 12 rows"),
        (["partition=lwo"], "expected one of low, gpu. Did you mean 'low'?"),
        (["nodes=6", "train.micro_batch=1"], "nodes: got 6, expected at most 4"),
        (["time=2-00:00:00"], "expected at most 1-00:00:00, the limit of partition low"),
        (["gpus=1"], "train.device=cpu: got this for a job of gpus=1 a node"),
        (["exclude=[n2]", "nodes=4", "train.micro_batch=1"], "exclude: leaves 3 of 4 nodes"),
        (["chain=[train,prep]"], "chain: got [train,prep], expected the training"),
        (["eval.limit=3"], "eval.limit=3: has no effect, eval is not in chain=[train]"),
        (["chain=[train,eval]", "sweep.seed=[1,2]"], "with a sweep, expected a chain or a sweep"),
        (["sweep.seed=1"], "sweep.seed=1: got 1, expected a list of values"),
        (["sweep.name=[a,b]"], "got a key that is the same for all runs of a sweep"),
        (["sweep.mixer=[mqa,atention]"], "mixer=atention: no such option"),
        (["chain=[train,eval]", "eval.lmit=3"], "lmit=3: the configuration has no key 'lmit'"),
        (["data.root=no/such"], "expected a directory made by `llmtrain prep`"),
        (["run_dir=/proc/no"], "run_dir: cannot write to /proc/no"),
        (["--config", "x.yaml"], "expected a command without overrides"),
    ],
)
def test_what_is_refused_is_not_submitted(fake_slurm, typed, tmp_path, capsys, arguments, message):
    assert launched(*typed, *arguments) == 2
    assert message in capsys.readouterr().err
    assert (fake_slurm / "calls").read_text() == ""
    assert not list(tmp_path.glob("runs/*/slurm/*/job.sbatch"))


def test_sizes_that_the_rows_do_not_divide_among(fake_slurm, typed, tmp_path, capsys):
    arguments = ("nodes=4", "min_nodes=2", "tasks_per_node=2", "train.micro_batch=1")
    typed = [text for text in typed if "global_batch_tokens" not in text]
    assert launched(*arguments, *typed, "train.global_batch_tokens=512") == 0
    assert only_submission(tmp_path / "runs" / "default").sizes == [4, 2]
    assert "of 3 nodes only 2 would work: 16 rows a step" in capsys.readouterr().out


def test_one_job_a_run(fake_slurm, typed, tmp_path, capsys):
    (fake_slurm / "queue").write_text(
        f"55|N/A|RUNNING|2|n[1-2]|None|9:00|llmtrain train {tmp_path}/runs/one\n"
    )
    assert launched("name=one", *typed) == 2
    assert "has job 55 already (running)" in capsys.readouterr().err
    assert launched("name=two", *typed) == 0


def test_a_training_without_a_job_holds_the_folder(fake_slurm, typed, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / ".lock").write_text('{"pid": 77, "host": "login1", "job": null}')
    assert launched("name=one", *typed) == 2
    assert "is in use by pid 77 on host login1" in capsys.readouterr().err
    (run_dir / ".lock").write_text("{}")
    assert launched("name=one", *typed) == 0


def test_a_checkpoint_of_another_training(fake_slurm, typed, tmp_path, capsys):
    folder = tmp_path / "runs" / "default" / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    save(compose("train", [*typed, "optimizer.lr=1"]), folder / "config.yaml")
    assert launched(*typed) == 2
    assert "optimizer.lr: 1 then, 0.001 now" in capsys.readouterr().err


def test_sbatch_refuses(fake_slurm, typed, tmp_path, capsys):
    (fake_slurm / "refuse").write_text("1")
    assert launched(*typed) == 2
    assert "Slurm refused: sbatch: error: invalid account" in capsys.readouterr().err


def test_a_chain(fake_slurm, typed, tmp_path):
    arguments = ("chain=[prep,train,eval]", "nodes=2", "cpus_per_task=2", "name=one")
    assert launched(*arguments, *typed, "eval.tasks=[passkey]", "prep.overwrite=true") == 0
    base = only_submission(tmp_path / "runs" / "one")
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert (fake_slurm / "calls").read_text().splitlines() == [
        f"--parsable {base.path / 'prep.sbatch'}",
        f"--parsable {after.format(101)} {base.path / 'job.sbatch'}",
        f"--parsable {after.format(102)} {base.path / 'eval.sbatch'}",
    ]
    assert (base.path / "job_id").read_text() == "102\n"
    prep = reload("prep", base.path / "prep.yaml")
    assert prep["overwrite"] is True
    assert prep["data"] == reload("train", base.config)["data"]
    evaluation = reload("eval", base.path / "eval.yaml")
    assert evaluation["checkpoint"] == str(tmp_path / "runs" / "one")
    assert (evaluation["tasks"], evaluation["device"]) == (["passkey"], "cpu")
    text = (base.path / "prep.sbatch").read_text()
    assert "--nodes=1\n" in text
    assert f"-m llmtrain.cli prep --config {base.path / 'prep.yaml'}\n" in text


def test_a_chain_that_breaks_is_taken_back(fake_slurm, typed, tmp_path, capsys):
    (fake_slurm / "refuse").write_text("2")
    assert launched("chain=[prep,train]", *typed) == 2
    assert "invalid account" in capsys.readouterr().err
    assert (fake_slurm / "calls").read_text().splitlines()[-1] == "scancel 101"


def test_a_chain_makes_its_corpus(fake_slurm, typed, tmp_path, capsys):
    elsewhere = [text for text in typed if not text.startswith("data.root=")]
    place = f"data.root={tmp_path / 'data'}"
    assert launched("chain=[prep,train]", *elsewhere, place, "tokenizer.vocab_size=null") == 2
    capsys.readouterr()
    assert launched("chain=[prep,train]", *elsewhere, place) == 0
    assert "memory of each of 1 ranks" in capsys.readouterr().out


def test_a_sweep_is_one_array(fake_slurm, typed, tmp_path, capsys):
    arguments = ("sweep.mixer=[attention,mqa]", "sweep.optimizer.lr=[1e-3,3e-4]", "array_limit=2")
    assert launched("name=s", *arguments, *typed) == 0
    root = tmp_path / "runs" / "s"
    base = only_submission(root)
    job = (base.path / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3%2\n" in job
    assert "job-%A_%a.log\n" in job
    points = [Submission.load(folder) for folder in base.points]
    assert [Path(point.run_dir).name for point in points] == [
        "mixer-attention_optimizer.lr-0.001",
        "mixer-attention_optimizer.lr-0.0003",
        "mixer-mqa_optimizer.lr-0.001",
        "mixer-mqa_optimizer.lr-0.0003",
    ]
    assert {point.code for point in points} == {base.code}
    config = reload("train", points[3].config)
    assert config["choices"]["mixer"] == "mqa"
    assert config["optimizer"]["lr"] == 3e-4
    assert config["run_dir"] == points[3].run_dir
    assert config["name"] == "s-mixer-mqa_optimizer.lr-0.0003"
    assert (points[3].path / "job_id").read_text() == "101_3\n"
    assert capsys.readouterr().out.count("\npoint ") == 4


def test_points_of_a_sweep():
    typed = Typed.split(['sweep.x=["a b",c]', "sweep.y=[[1,2],null,true]"]).sweep
    points = sweep.points(groups.parse(typed))
    assert points[0].overrides == ('x="a b"', "y=[1, 2]")
    assert points[0].name == "x-a-b_y-1-2"
    assert points[-1].overrides == ("x=c", "y=true")
    with pytest.raises(ValueError, match="2 points would share the folder x-a-b"):
        sweep.points(groups.parse(['sweep.x=["a b","a/b"]']))


def test_whose_an_override_is():
    typed = Typed.split(
        [
            *("nodes=2", "preflight.disk_gib=1", "train.seq_len=8", "mixer=mqa"),
            *("eval.tasks=[ngram]", "prep.overwrite=true", "sweep.seed=[1,2]", "plan.mfu=0.3"),
            "+mixer@mixers.b=mqa",
        ]
    )
    assert typed.launch == ["nodes=2", "preflight.disk_gib=1"]
    assert typed.train == ["train.seq_len=8", "mixer=mqa", "+mixer@mixers.b=mqa"]
    assert (typed.eval, typed.prep) == (["tasks=[ngram]"], ["overwrite=true"])
    assert (typed.sweep, typed.plan) == (["sweep.seed=[1,2]"], ["plan.mfu=0.3"])


def test_hours_of_a_plan(fake_slurm, typed, capsys):
    assert launched("dry_run=true", *typed, "plan.tokens_per_second=64") == 0
    assert "hours: 1.00 at 64 tokens/s" in capsys.readouterr().out
