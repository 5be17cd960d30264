"""Rows a rank computes at once, and the held-out rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmtrain.config import compose
from llmtrain.data.loader import TokenLoader
from llmtrain.distributed import World
from llmtrain.plan import make_plan
from llmtrain.train import batches
from llmtrain.train.batches import HeldOut, choose_micro_batch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def plan(ranks: int = 1, rows: int = 24):
    options = ["train.seq_len=128", f"train.global_batch_tokens={rows * 128}"]
    config = compose("train", [*options, "train.micro_batch=1"])
    return replace(make_plan(config, ranks=1), ranks=ranks)


def test_given():
    assert choose_micro_batch(6, plan(ranks=2), 1, CPU) == 6
    with pytest.raises(
        ValueError,
        match=r"train.micro_batch: got 5, expected a divisor of the 12 rows that each of 2",
    ):
        choose_micro_batch(5, plan(ranks=2), 1, CPU)


def test_chosen_by_memory(monkeypatch, caplog):
    made = plan()
    one, row = made.memory[1].total, made.row_bytes
    for rows, expected in ((1, 1), (5, 4), (8, 8), (23, 12), (24, 24)):
        fits = (one + (rows - 1) * row) / batches.MEMORY_SHARE["cuda"] + 1
        monkeypatch.setattr(batches, "device_memory", lambda device, fits=fits: int(fits))
        assert choose_micro_batch(None, made, 1, GPU) == expected
    monkeypatch.setattr(batches, "device_memory", lambda device: one // 2)
    assert choose_micro_batch(None, made, 1, GPU) == 1
    assert "one row is estimated at" in caplog.text


def test_chosen_on_a_cpu_stays_in_its_caches():
    assert choose_micro_batch(None, plan(rows=64), 1, CPU) == batches.CPU_TOKENS // 128


@pytest.mark.parametrize("size", [1, 2, 3])
def test_held_out_rows_count_once_over_ranks(corpus, size):
    config = compose("train", corpus)
    folder = f"{config['data']['root']}/text"
    loader = TokenLoader.open(folder, "val", seq_len=16, seed=0)

    def rows(rank: int, tokens: int) -> HeldOut:
        world = World(rank=rank, size=size, local_rank=rank)
        options = {"micro_rows": 4, "mask_documents": True, "device": CPU}
        return HeldOut(loader, tokens=tokens, seq_len=16, world=world, **options)

    for tokens, expected in ((1, 1), (16 * 13 + 3, 13), (10**9, loader.rows_per_epoch)):
        per_rank = [list(rows(rank, tokens)) for rank in range(size)]
        assert len({len(micros) for micros in per_rank}) == 1  # ZeRO-3 needs equally many
        seen = torch.cat(
            [m.tokens_BT[m.weights_BT.sum(1) > 0] for micros in per_rank for m in micros]
        )
        whole = loader.batch(0, expected)
        assert len(seen) == expected
        assert {tuple(row) for row in seen.tolist()} == {
            tuple(row) for row in whole.tokens_BT.tolist()
        }
        total = sum(m.weights_BT.sum() for micros in per_rank for m in micros)
        assert total == whole.weights_BT.sum()
