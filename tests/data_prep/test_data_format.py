"""The reading example of docs/data_format.md works as printed."""

import re
from pathlib import Path

from llmtrain_data.manifest import Manifest, open_split


def test_the_printed_reader(tmp_path, make_corpus, monkeypatch):
    make_corpus()
    page = (Path(__file__).parents[2] / "docs" / "data_format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    monkeypatch.chdir(tmp_path / "corpus" / "train" / "words")
    names = {}
    exec(code, names)
    shard = open_split(tmp_path / "corpus", Manifest.load(tmp_path / "corpus"), "train")["words"][0]
    assert names["tokens"].tolist() == shard.tokens.tolist()
    assert names["starts"].tolist() == shard.starts.tolist()
    assert names["first_document"].tolist() == shard.tokens[: shard.starts[1]].tolist()
