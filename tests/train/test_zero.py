"""What DeepSpeed is told: known keys only, nothing that matters left to a default."""

from __future__ import annotations

import os

import pytest
import torch

from llmtrain import build
from llmtrain.config import compose
from llmtrain.train.engine import load_deepspeed
from llmtrain.train.zero import Zero0, deepspeed_config

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
