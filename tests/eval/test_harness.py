"""Names to tasks, and the message for each way in which that fails."""

import json

import datasets
import huggingface_hub.constants
import pytest
from llmtrain_eval.harness import evaluate, load_tasks

ITEMS = [
    {"query": f"value {i} is", "choices": ["green", "blue", "a line"], "gold": i % 3}
    for i in range(9)
]


@pytest.fixture
def offline(monkeypatch):
    """Whatever the environment said when these packages were first imported."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def task_file(tmp_path):
    """task_file(task="local", ...): a folder with one task file over a local jsonl file."""

    def make(**changes):
        data = tmp_path / "items.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
        config = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "c")},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            **changes,
        }
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{config['task']}.yaml").write_text(json.dumps(config))
        return str(folder)

    return make


def test_local_items(make_lm, task_file):
    """Scores, their standard errors, the limit; equal to what the samples say."""
    loaded = load_tasks(["local"], metadata={}, include_path=task_file())
    scores, samples = evaluate(make_lm(), loaded)
    accs = [sample["acc"] for sample in samples["local"]]
    assert scores["local"]["acc"] == sum(accs) / 9
    assert scores["local"]["samples"] == 9
    assert scores["local"]["shots"] == 0
    assert scores["local"]["acc_stderr"] > 0
    loaded = load_tasks(["local"], metadata={}, include_path=task_file())
    assert evaluate(make_lm(), loaded, limit=4)[0]["local"]["samples"] == 4


def test_number_of_examples(task_file):
    """Ours, unless the task says none; a task's own number without ours."""

    def shots(wanted, **changes):
        folder = task_file(fewshot_split="test", **changes)
        loaded = load_tasks(["local"], metadata={}, include_path=folder, num_fewshot=wanted)
        return loaded["tasks"]["local"].get_config("num_fewshot")

    assert shots(3) == 3
    assert shots(None) == 0
    assert shots(None, num_fewshot=2) == 2
    assert shots(3, num_fewshot=2) == 3
    assert shots(3, num_fewshot=0) == 0


def test_groups_and_task_files(make_lm, task_file, tmp_path):
    folder = task_file()
    group = {
        "group": "pair",
        "task": ["local"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "tasks" / "pair.yaml").write_text(json.dumps(group))
    scores, _ = evaluate(make_lm(), load_tasks(["pair"], metadata={}, include_path=folder))
    assert scores["pair"]["acc"] == scores["local"]["acc"]
    by_path = load_tasks([str(tmp_path / "tasks" / "local.yaml")], metadata={})
    assert list(by_path["tasks"]) == ["local"]


def test_unknown_names_list_near_ones(task_file):
    """Of our tasks, lm-eval's, and the names that others know."""
    with pytest.raises(ValueError, match=r"^tasks: got the unknown") as raised:
        load_tasks(
            ["next_lime", "arc_eazy", "bits_per_bite", "local"],
            metadata={},
            include_path=task_file(),
            others=("bits_per_byte",),
        )
    message = str(raised.value)
    assert "unknown next_lime, arc_eazy, bits_per_bite, expected names of lm-eval's" in message
    assert "next_lime: nearest are next_line" in message
    assert "arc_easy" in message
    assert "bits_per_bite: nearest are bits_per_byte" in message


@pytest.mark.slow
def test_shipped_tasks_without_a_network(offline):
    """Slow for the index of lm-eval's tasks; the test below asks the same of a file of its own."""
    with pytest.raises(ValueError, match=r"^task arc_easy: its data set") as raised:
        load_tasks(["arc_easy"], metadata={})
    message = str(raised.value)
    assert "allenai/ai2_arc (ARC-Easy) could not be loaded: ConnectionError" in message
    assert "include_path; eval/README.md shows one" in message


def test_tasks_of_the_hub_without_a_network(offline, task_file, tmp_path):
    far = {"dataset_path": "somebody/far-away", "dataset_kwargs": None, "tag": "remote"}
    folder = task_file(task="far", **far)
    with pytest.raises(ValueError, match=r"^task far: its data set somebody/far-away") as raised:
        load_tasks(["far"], metadata={}, include_path=folder)
    assert "OfflineModeIsEnabled" in str(raised.value)
    assert "include_path; eval/README.md shows one" in str(raised.value)
    with pytest.raises(ValueError, match="task remote: its data set somebody/far-away could not"):
        load_tasks(["remote"], metadata={}, include_path=folder)
    group = {"group": "all", "task": [{"task": "far"}]}
    (tmp_path / "tasks" / "all.yaml").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="task all: its data set somebody/far-away could not"):
        load_tasks(["all"], metadata={}, include_path=folder)


def test_missing_data_files(task_file, tmp_path):
    missing = {"data_files": {"test": str(tmp_path / "none.jsonl")}}
    folder = task_file(dataset_kwargs=missing)
    with pytest.raises(ValueError, match=r"task local: its data set json .*none.jsonl.*could not"):
        load_tasks(["local"], metadata={}, include_path=folder)


def test_missing_packages(task_file, tmp_path):
    task_file()
    with (tmp_path / "tasks" / "needy.yaml").open("w") as file:
        file.write("task: needy\ncustom_dataset: !function no_such_package.load\n")
    with pytest.raises(ValueError, match=r"task needy: needs a package that is not .*no_such_pack"):
        load_tasks(["needy"], metadata={}, include_path=str(tmp_path / "tasks"))


def test_folders_that_hold_no_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"include_path: got .*nowhere, expected a folder with"):
        load_tasks(["passkey"], metadata={}, include_path=str(tmp_path / "nowhere"))
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(ValueError, match=r"include_path: .*broken.yaml cannot be read as a task"):
        load_tasks(["passkey"], metadata={}, include_path=str(tmp_path))
