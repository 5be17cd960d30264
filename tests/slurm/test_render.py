"""What a job asks for, and the files that are given to sbatch."""

from __future__ import annotations

import re
import subprocess

import pytest

from llmtrain.config import compose
from llmtrain.slurm import template
from llmtrain.slurm.resources import Resources, seconds


def resources(*overrides: str) -> Resources:
    return Resources.of(compose("launch", overrides))


def test_the_defaults_ask_for_one_rank_on_one_node():
    assert resources().options() == ["--ntasks-per-node=1"]
    assert resources().node_range == "1"


def test_every_key_becomes_an_option():
    asked = resources(
        "nodes=4",
        "gpus=8",
        "partition=p",
        "account=a",
        "qos=q",
        "time=2-00:00:00",
        "cpus_per_task=12",
        "mem=0",
        "constraint='ib&h100'",
        "exclude=[n1,n2]",
        'sbatch=["--reservation=r"]',
    )
    assert asked.options() == [
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--time=2-00:00:00",
        "--cpus-per-task=12",
        "--mem=0",
        "--constraint=ib&h100",
        "--exclude=n1,n2",
        "--reservation=r",
    ]


def test_gpus_by_gres():
    assert "--gres=gpu:4" in resources("gpus=4", "gpu_request=gres").options()


def test_a_range_of_nodes_names_no_tasks():
    asked = resources("nodes=4", "min_nodes=2", "gpus=8", "cpus_per_task=3")
    assert asked.node_range == "2-4"
    assert asked.sizes == [4, 3, 2]
    assert "--mincpus=24" in asked.options()
    assert not any("ntasks" in option for option in asked.options())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodes=0", "nodes: got 0, expected 1 or more"),
        ("gpus=-1", "gpus: got -1, expected 0 or more"),
        ("min_nodes=2", "min_nodes: got 2, expected at most nodes=1"),
        ("time=soon", "time: got 'soon', expected minutes, hours:minutes:seconds"),
        ("time=5", "signal_seconds: got 300, expected less than the limit time=5 (300 seconds)"),
        ("max_restarts=-1", "max_restarts: got -1, expected 0 or more"),
        ('sbatch=["--time=3"]', "'--time=3' would be given twice"),
        ('sbatch=["-N 3"]', "'-N 3' would be given twice"),
        ('sbatch=["reservation=x"]', "expected an option such as --reservation=llm"),
        ("gpu_request=gpus", "expected one of gpus-per-node, gres"),
        ("preflight.disk_gib=0", "preflight.disk_gib: got 0, expected more than 0"),
        ("array_limit=0", "array_limit: got 0, expected more than 0"),
    ],
)
def test_what_cannot_be_asked_for(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resources(override)


def test_tasks_beside_gpus():
    with pytest.raises(ValueError, match="got 4 with gpus=8, expected one rank for each GPU"):
        resources("gpus=8", "tasks_per_node=4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("12:00:00", 43200),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("1-02:03:04", 86400 + 7384),
        ("infinite", None),
        ("1:2:3:4", None),
    ],
)
def test_times(text, expected):
    assert seconds(text) == expected


VALUES = {
    "name": "a run",
    "comment": "llmtrain train /runs/a run",
    "nodes": "2-4",
    "options": ["--gpus-per-node=8", "--mem=0"],
    "directory": "/home/me",
    "log": "/runs/a run/job-%j.log",
    "signal_seconds": "300",
    "code": "/runs/a run/code",
    "environment": ["module load cuda", "export A=$HOME"],
    "python": "/venv/bin/python",
    "submission": "/runs/a run/slurm/1",
}


def test_train_sbatch():
    lines = template.render("train.sbatch", VALUES).splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options == [
        "--job-name='a run'",
        "--comment='llmtrain train /runs/a run'",
        "--nodes=2-4",
        "--gpus-per-node=8",
        "--mem=0",
        "--chdir=/home/me",
        "--output='/runs/a run/job-%j.log'",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR2@300",
    ]
    assert lines[-5:-3] == ["module load cuda", "export A=$HOME"]
    # after lines that may set it too
    assert lines[-2].startswith("export PYTHONPATH='/runs/a run/code' ")
    assert lines[-1:] == [
        "exec /venv/bin/python -m llmtrain.slurm.batch '/runs/a run/slurm/1'",
    ]


def test_templates_hold_no_logic():
    """Comments, variables, and one command."""
    for file in template.folder().glob("*.sbatch"):
        lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
        kinds = [line.split()[0] for line in lines]
        assert kinds == ["{options}", "{environment}", "export", "exec"], file


def test_rendered_files_are_good_shell(tmp_path):
    file = tmp_path / "job.sbatch"
    file.write_text(template.render("train.sbatch", {**VALUES, "python": "echo"}))
    done = subprocess.run(["bash", file], capture_output=True, text=True, check=True)
    assert done.stdout == "-m llmtrain.slurm.batch /runs/a run/slurm/1\n"


def test_a_placeholder_without_a_value_is_noticed():
    with pytest.raises(AssertionError):
        template.render("train.sbatch", {k: v for k, v in VALUES.items() if k != "code"})
