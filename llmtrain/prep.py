"""`llmtrain prep`: the sources and the tokenizer of a configuration, made into a corpus."""

from __future__ import annotations

from pathlib import Path

from llmtrain_data.manifest import Manifest
from llmtrain_data.prepare import prepare

from llmtrain import build, groups


def corpus_dir(config: dict) -> Path:
    """Where the corpus of a configuration lies."""
    return Path(config["data"]["root"]) / config["data"]["name"]


def run_prep(config: dict) -> Manifest:
    """Make the corpus of a resolved prep.yaml, or find it already made."""
    data = config["data"]
    return prepare(
        out_dir=corpus_dir(config),
        sources=build.build_sources(config),
        val_sources=build.build_sources(config, "val_sources"),
        tokenizer=build.part(config["tokenizer"], build.label(config, "tokenizer")),
        val_fraction=data["val_fraction"],
        shard_tokens=data["shard_tokens"],
        workers=data["workers"],
        overwrite=config["overwrite"],
    )


def check_tokenizer(config: dict) -> None:
    """ValueError when the command line of a training run asks for another tokenizer than the one
    that the corpus was made with: a run takes the corpus's, so the wish would have no effect."""
    typed = groups.given(groups.parse(config["overrides"]), "tokenizer")
    if typed is None:
        return
    spec = build.part(config["tokenizer"], build.label(config, "tokenizer"))
    wanted, corpus = spec.describe(), corpus_dir(config)
    made = Manifest.load(corpus).request["tokenizer"]
    for key in sorted(wanted.keys() | made.keys()):
        if wanted.get(key) != made.get(key):
            raise ValueError(
                f"{typed.input_line}: got tokenizer {key}={wanted.get(key)}, but {corpus} was made "
                f"with {key}={made.get(key)}; run `llmtrain prep` with this tokenizer and another "
                "data.name, or remove the override"
            )
