"""What DeepSpeed is told: known keys only, nothing that matters left to a default."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from llmtrain import build
from llmtrain.config import compose
from llmtrain.train.engine import load_deepspeed
from llmtrain.train.partitions import FlatPartitions
from llmtrain.train.zero import Zero0, deepspeed_config, for_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")


def zero(option: str) -> Zero0:
    config = compose("train", [f"deepspeed={option}"])
    return build.part(config["deepspeed"], f"deepspeed={option}")


@pytest.mark.parametrize("option", STAGES)
def test_deepspeed_reads_what_we_wrote(option, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    load_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.config import DeepSpeedConfig

    chosen = zero(option)
    config = deepspeed_config(chosen, micro_batch=4, world_size=1)
    read = DeepSpeedConfig(config)
    assert read.gradient_clipping == 0.0
    assert read.gradient_accumulation_steps == 1
    assert read.train_micro_batch_size_per_gpu == 4
    assert read.grad_accum_dtype == "fp32"
    assert not read.bfloat16_config.enabled
    assert not read.float16_config.enabled
    assert not read.timers_config.enabled
    assert read.zero_config.stage == chosen.stage == int(option[-1])
    fields = type(read.zero_config).model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert config["zero_optimization"].keys() <= known
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("option", STAGES[1:])
def test_knobs_arrive(option):
    section = zero(option).section()
    assert section["reduce_bucket_size"] == (200_000_000 if option == "zero1" else 100_000_000)
    assert section["overlap_comm"] is (option != "zero1")


def test_error():
    with pytest.raises(
        ValueError, match=r"communication_dtype: got 'fp8', expected one of fp32, b"
    ):
        Zero0(communication_dtype="fp8")


def test_one_rank_divides_nothing():
    for option in STAGES:
        chosen = zero(option)
        assert for_ranks(chosen, 2) is chosen
        alone = for_ranks(chosen, 1)
        assert alone.stage == (3 if option == "zero3" else 0)
        assert alone.communication_dtype == chosen.communication_dtype


def test_masters_are_the_weights():
    """What the optimizer writes is what the model reads, without a copy."""
    flat = torch.arange(6.0)
    master = torch.nn.Parameter(flat[3:].clone())
    group = {"params": [master], "state": ("exp_avg",)}
    fake = SimpleNamespace(
        parallel_partitioned_bit16_groups=[[flat[:3], flat[3:]]],
        single_partition_of_fp32_groups=[master],
        optimizer=SimpleNamespace(param_groups=[group], state={master: {}}),
    )
    FlatPartitions(torch.nn.Module(), fake, 1)
    with torch.no_grad():
        master += 1
    assert flat.tolist() == [0, 1, 2, 4, 5, 6]
    assert fake.optimizer.state[master]["exp_avg"].shape == master.shape
