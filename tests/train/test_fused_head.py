"""Runs whose head keeps no logits: the same losses, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.train.loop import train

TWO = ("objective=multi_token", "objective.depth=1", "objective.z_loss=1e-3")
FUSED = (*TWO, "objective.backend=chunked", "objective.chunk_tokens=50")
# every weight is gathered where it is asked for, and let go of after
KNOBS = ("deepspeed.param_persistence_threshold=0", "deepspeed.max_reuse_distance=0")
STAGE3 = ("deepspeed=zero3", *KNOBS)
VARIANTS = {
    "zero1": (*FUSED, "deepspeed=zero1"),
    "zero3": (*FUSED, *STAGE3),
    "untied": (*FUSED, *STAGE3, "model.tie_embeddings=false"),
}


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", VARIANTS)
def test_same_losses(configure, tmp_path, kind):
    plain = [option for option in VARIANTS[kind] if option in (*TWO, "model.tie_embeddings=false")]
    runs = {"plain": plain, "fused": VARIANTS[kind]}
    for name, options in runs.items():
        train(configure(name, *options))
    losses = {name: [line["loss"] for line in lines(tmp_path / name, "ledger")] for name in runs}
    assert losses["fused"] == pytest.approx(losses["plain"], rel=2e-5)
    norms = {
        name: [line["grad_norm"] for line in lines(tmp_path / name, "ledger")] for name in runs
    }
    assert norms["fused"] == pytest.approx(norms["plain"], rel=1e-3)
    backends = [lines(tmp_path / name, "starts")[0]["backends"] for name in runs]
    assert "objective" not in backends[0]
    assert backends[1]["objective"] == "chunked"
