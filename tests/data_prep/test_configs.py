"""The shipped options list every knob of what they name."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
KEYS = {
    "name",
    "root",
    "sources",
    "val_sources",
    "val_fraction",
    "weights",
    "shard_tokens",
    "workers",
}


def load(group, option):
    return yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text())


def knobs_of(node):
    module, _, name = node["_target_"].rpartition(".")
    return inspect.signature(getattr(importlib.import_module(module), name)).parameters


@pytest.mark.parametrize("option", DATA)
def test_data(option):
    node = load("data", option)
    assert set(node) == KEYS
    assert node["name"] == option
    for name, source in {**node["sources"], **node["val_sources"]}.items():
        parameters = knobs_of(source)
        assert set(source) - {"_target_"} == set(parameters), name
        for key, parameter in parameters.items():
            default = parameter.default
            if default is not inspect.Parameter.empty and key not in ("patterns", "topics"):
                wanted = list(default) if isinstance(default, tuple) else default
                assert source[key] == wanted, key


def test_sources_have_an_option():
    named = {
        source["_target_"].rpartition(".")[2]
        for option in DATA
        for source in load("data", option)["sources"].values()
    }
    assert named == {"LocalFiles", "Jsonl", "Parquet", "HuggingFace", "StandardLibrary"}


@pytest.mark.parametrize("option", ["bpe", "existing"])
def test_tokenizer(option):
    node = load("tokenizer", option)
    parameters = knobs_of(node)
    assert set(node) - {"_target_", "_partial_"} == set(parameters)
    for key, parameter in parameters.items():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            assert node[key] == (list(default) if isinstance(default, tuple) else default), key
