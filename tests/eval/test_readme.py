"""What eval/README.md shows works as it stands there."""

import json
import re
from pathlib import Path

import pytest
import yaml
from llmtrain_eval.harness import evaluate, load_tasks

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "eval" / "README.md").read_text()
ITEMS = {
    "arc_local": {"query": "value {i}", "choices": ["green", "blue", "a line"], "gold": 1},
    "lambada_local": {"context": "the model reads {i}", "continuation": "tokens"},
    "winogrande_local": {
        "context_options": ["the key {i} green", "the key {i} blue"],
        "continuation": "reads a line",
        "gold": 0,
    },
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    """The task files of the README with items of their kinds; we stand where their paths begin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "bench").mkdir()
    for block in blocks("yaml"):
        config = yaml.safe_load(block)
        (tmp_path / "my_tasks" / f"{config['task']}.yaml").write_text(
            block.replace("dataset_kwargs: {", f"dataset_kwargs: {{cache_dir: {tmp_path}/cache, ")
        )
        item = json.dumps(ITEMS[config["task"]])
        lines = [item.replace("{i}", str(i)) + "\n" for i in range(6)]
        Path(config["dataset_kwargs"]["data_files"]["test"]).write_text("".join(lines))


@pytest.mark.usefixtures("my_tasks")
def test_task_files(make_lm):
    lm = make_lm()
    scores, samples = evaluate(lm, load_tasks(list(ITEMS), metadata={}, include_path="my_tasks"))
    assert set(scores) == set(ITEMS)
    assert scores["arc_local"].keys() > {"acc", "acc_norm", "acc_stderr"}
    assert scores["lambada_local"].keys() > {"acc", "perplexity"}
    context, word = samples["lambada_local"][0]["arguments"][0]
    assert (context, word) == ("the model reads 0", " tokens")
    pairs = samples["winogrande_local"][2]["arguments"]
    assert pairs == [("the key 2 green", " reads a line"), ("the key 2 blue", " reads a line")]
    assert samples["arc_local"][1]["arguments"][2] == ("value 1\nAnswer:", " a line")


@pytest.mark.usefixtures("my_tasks")
def test_python(run_dir, capsys):
    (code,) = blocks("python")
    names = {}
    exec(code.replace("runs/x", str(run_dir)).replace('"cuda"', '"cpu"'), names)
    assert names["scores"]["arc_local"]["samples"] == 6


def test_every_file_is_listed_and_every_listed_file_exists():
    shown = set(re.findall(r"^llmtrain_eval/(\w+)\.py", README, re.MULTILINE))
    package = ROOT / "eval" / "llmtrain_eval"
    assert shown == {path.stem for path in package.glob("*.py")} - {"__init__"}


def test_commands_compose(eval_config, run_dir):
    commands = re.findall(r"llmtrain(?:\.cli)? eval checkpoint=runs/x ?(.*)", README)
    assert len(commands) == 6
    for command in commands:
        overrides = command.split("#")[0].split("`")[0].split()
        assert eval_config(run_dir, *overrides)["checkpoint"] == str(run_dir)
