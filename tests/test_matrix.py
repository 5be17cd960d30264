"""Any mixer with any channel, stack and objective trains, resumes, generates and evaluates.

All combinations are too many: some are drawn by a fixed seed, so that every option of every group
stands in at least one. New YAML files join by themselves, and change the draw.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from llmtrain_eval.run import run_eval
from omegaconf import OmegaConf

from llmtrain import build, groups
from llmtrain.checkpoint import FragmentReader, list_checkpoints
from llmtrain.config import compose, hydra_compose
from llmtrain.continuation import continuations
from llmtrain.prep import run_prep
from llmtrain.train.loop import train
from llmtrain.validate import READ_BY_BUILD, interpolated

SEED, COUNT = 0, 20
GROUPS = ("mixer", "channel", "stack", "objective")
STEPS, HALF, ROWS, TOKENS = 4, 2, 4, 32
# Sizes that every option fits. Those of the model that a combination does not read are left out.
SMALL = (
    "model.d_model=32",
    "model.n_layers=4",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=24",
    f"train.seq_len={TOKENS}",
    f"train.global_batch_tokens={ROWS * TOKENS}",
    f"train.total_tokens={STEPS * ROWS * TOKENS}",
    f"train.micro_batch={ROWS // 2}",
    "train.log_every=1",
    "train.val_every=100",
    "train.val_tokens=128",
    f"train.save_every={HALF}",
    "train.device=cpu",
    "tracker=none",
    "deepspeed=zero0",
)


def draw(options: dict[str, list[str]]) -> list[dict[str, str]]:
    """Combinations: each group's options in a random order, again and again, side by side."""
    count = max(COUNT, *(len(names) for names in options.values()))
    columns = {}
    for group, names in options.items():
        shuffle = random.Random(f"{SEED}/{group}")
        column: list[str] = []
        while len(column) < count:
            column += shuffle.sample(names, len(names))
        columns[group] = column[:count]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


OPTIONS = {group: groups.options()[group] for group in GROUPS}
COMBINATIONS = draw(OPTIONS)


def chosen(combination: dict[str, str]) -> list[str]:
    """Overrides for a combination, with rotary positions if one of its mixers reads them."""
    typed = [f"{group}={option}" for group, option in combination.items()]
    raw, choices = hydra_compose("train", typed, ())
    config = {**OmegaConf.to_container(raw, resolve=True), "choices": choices}
    mixers = build.mounted(config).values()
    rotary = any(build.target(*mixer).uses_positions for mixer in mixers)
    read = READ_BY_BUILD | interpolated(OmegaConf.to_container(raw, resolve=False), "model")

    def effective(override: str) -> bool:
        section, _, key = override.partition("=")[0].partition(".")
        return section != "model" or key in read

    typed.append(f"position={'rope' if rotary else 'none'}")
    return [*typed, *filter(effective, SMALL)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Overrides of a small prepared corpus of random words."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    for number in range(30):
        text = " ".join("".join(words.choices("etaoinsh", k=3)) for _ in range(150))
        (folder / f"{number:02d}.txt").write_text(text)
    overrides = [
        "data=text",
        f"data.sources.text.root={folder}",
        f"data.root={folder / 'data'}",
        "data.val_fraction=0.2",
        "data.workers=1",
        "tokenizer.vocab_size=280",
    ]
    run_prep(compose("prep", overrides))
    return overrides


def fragments(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of a checkpoint."""
    (path,) = [path for found, path in list_checkpoints(run_dir) if found == step]
    reader = FragmentReader(path)
    tensors = {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            shape = torch.Size(reader.manifest.parameters[name])
            tensors[f"{kind}/{name}"] = out = torch.empty(shape.numel())
            reader.read(kind, name, 0, out)
    return tensors


def test_every_option_is_drawn():
    for group, names in OPTIONS.items():
        assert {combination[group] for combination in COMBINATIONS} == set(names), group
    assert draw(OPTIONS) == COMBINATIONS


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(c.values()))
def test_trains_resumes_generates_evaluates(combination, corpus, tmp_path):
    overrides = [*corpus, *chosen(combination)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    summary = train(compose("train", [*overrides, f"run_dir={whole}"]))
    assert summary["finished"]
    assert summary["skipped"] == 0
    assert 0 < summary["val"]["bits_per_byte"] < 12

    start = dict(list_checkpoints(whole))[HALF]
    again = train(compose("train", [*overrides, f"run_dir={resumed}", f"train.resume={start}"]))
    assert [step for step, _ in list_checkpoints(resumed)] == [STEPS]  # it did not start afresh
    assert again["val"] == summary["val"]
    expected, got = fragments(whole, STEPS), fragments(resumed, STEPS)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not expected[name].equal(got[name])]
    assert not different

    typed = [f"checkpoint={whole}", "prompt=[the tea, a]", "max_new_tokens=5", "device=cpu"]
    texts = list(continuations(compose("generate", typed)))
    assert len(texts) == 2

    typed = [f"checkpoint={whole}", "tasks=[bits_per_byte]", "device=cpu"]
    results = run_eval(compose("eval", [*typed, "bits_per_byte.max_tokens=128"]))
    assert 0 < results["bits_per_byte"]["model"]["bits_per_byte"] < 12
