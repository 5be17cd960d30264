import json
import os

import datasets
import pytest
from llmtrain_data.sources import HuggingFace

TEXTS = ["first \u00e9", "second", "third"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_saved_dataset(tmp_path):
    path = str(tmp_path / "saved")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
    source = HuggingFace(path)
    assert [d.text for d in source] == TEXTS
    assert [d.id for d in source] == ["train:0", "train:1", "train:2"]
    assert source.describe()["files"] == 1


def test_saved_splits(tmp_path, message):
    path = str(tmp_path / "saved")
    split = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": split, "dev": split.select([1])}).save_to_disk(path)
    assert [d.text for d in HuggingFace(path, split="dev")] == ["second"]
    with message(path, "split='test'", "no such split", "'train', 'dev'", "set split"):
        list(HuggingFace(path, split="test"))


@pytest.mark.parametrize("streaming", [True, False])
def test_local_data_files(tmp_path, message, streaming):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = HuggingFace("json", data_files=str(file), streaming=streaming)
    assert [d.text for d in source] == TEXTS
    before = source.describe()
    os.utime(file, (1, 1))
    assert source.describe()["listing"] != before["listing"]
    with message("path='json'", "split='test'"):
        list(HuggingFace("json", data_files=str(file), split="test", streaming=streaming))


def test_unknown_field(tmp_path, message):
    path = str(tmp_path / "saved")
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(path)
    with message(path, "record 0", "no field 'text'", "'body'", "text_field"):
        list(HuggingFace(path))


def test_offline_and_missing(message):
    with message("'nobody/nothing'", "cannot be fetched", "data_files", "save_to_disk"):
        list(HuggingFace("nobody/nothing"))


def test_missing_data_files(tmp_path, message):
    gone = str(tmp_path / "gone.jsonl")
    with message("path='json'", "gone.jsonl", "cannot be fetched"):
        list(HuggingFace("json", data_files=gone))
