"""The YAML files of the groups around the mixer: every knob, its default, the sizes."""

import inspect
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmtrain import build
from llmtrain.accounting import parameters_by_part

CONFIGS = Path(__file__).parents[2] / "configs"
# What build.py hands to a constructor beside the knobs.
RUNTIME = {
    "embedding": {"vocab_size"},
    "channel": {"layer_idx", "n_layers"},
    "norm": set(),
    "stack": {"d_model", "norm"},
    "objective": set(),
}
FILES = [path for group in RUNTIME for path in sorted((CONFIGS / group).glob("*.yaml"))]
# Parameters without embedding and head, which depend on the tokenizer; None: tuned, not promised.
SIZES = {
    "tiny": 0.74e6,
    "quickstart": None,
    "gpt_124m": 75.5e6,
    "gpt_350m": 283e6,
    "llama_1b": 1.13e9,
    "llama3_8b": 6.98e9,
    "llama3_70b": 68.45e9,
    "deepseek_v3": None,  # its parts are those of an experiment: tests/config/test_presets.py
    "deepseek_v3_mini": None,
    "mixtral_8x7b": None,
    "jamba": None,
    "xlstm_7b": None,
    "gated_deltanet_1_3b": None,
    "qwen3_next_80b_a3b": None,
    "mamba2_370m": None,
    "mamba2_2_7b": None,
    "mamba2_8b": None,
    "huginn_3_5b": None,
    "samba": None,
    "zamba_7b": None,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_knobs_are_those_of_the_constructor(path):
    node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    node.pop("defaults", None)  # of a stack that mounts mixers
    signature = inspect.signature(build.target(node, path.stem))
    keyword_only = {n: p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    knobs = set(build.knobs(node))
    if path.parent.name == "stack":
        assert knobs >= set(build.BLOCK_KNOBS)
        knobs -= set(build.BLOCK_KNOBS)
    assert knobs == set(keyword_only) - RUNTIME[path.parent.name]
    assert node["_partial_"] is True
    for name in knobs:
        default = keyword_only[name].default
        if default is not inspect.Parameter.empty and not str(node[name]).startswith("${"):
            assert node[name] == default, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_knob_has_a_comment(path):
    for line in path.read_text().partition("_partial_: true\n")[2].splitlines():
        assert " # " in line, line


def test_sizes_have_the_same_keys():
    keys = {p.stem: list(OmegaConf.load(p)) for p in (CONFIGS / "model").glob("*.yaml")}
    assert sorted(keys) == sorted(SIZES)
    assert len({tuple(value) for value in keys.values()}) == 1


@pytest.mark.parametrize("size", SIZES)
def test_sizes_build_on_meta(build_model, size):
    model = build_model(model=size, vocab_size=30000, device="meta")
    counts = parameters_by_part(model)
    blocks = counts["total"] - counts["embedding"] - counts["head"]
    assert SIZES[size] is None or blocks == pytest.approx(SIZES[size], rel=0.01)
    assert all(parameter.is_meta for parameter in model.parameters())
