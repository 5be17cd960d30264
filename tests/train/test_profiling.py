"""What a profile says: classes of kernels, instants that add up, and files of a real run."""

from __future__ import annotations

import gzip
import json

import pytest

from llmtrain.config import compose
from llmtrain.train.account import (
    KINDS,
    OWNERS,
    Event,
    Work,
    bandwidth,
    floors,
    gaps,
    kind_of,
    owned,
    page,
    union,
)
from llmtrain.train.loop import train

# Names as profilers of H100s and of CPUs give them.
NAMED = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "matmul",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<f8f8bf16>>": "matmul",
    "triton_tem_fused_mm_3": "matmul",
    "aten::mm": "matmul",
    "aten::addmm": "matmul",
    "aten::bmm": "matmul",
    "linear_cross_entropy_fwd_kernel": "matmul",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
    "void multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
    "aten::_fused_adamw_": "optimizer",
    "aten::_foreach_norm": "optimizer",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0": "memory-bound",
    "rms_norm_fwd_kernel": "memory-bound",
    "swiglu_bwd_kernel": "memory-bound",
    "aten::mul": "memory-bound",
    "Memcpy DtoH (Device -> Pinned)": "copies",
    "Memset (Device)": "copies",
    "aten::copy_": "copies",
}


@pytest.mark.parametrize("name", NAMED)
def test_kinds_of_kernels(name):
    assert kind_of(name) == NAMED[name]


def test_every_kind_owns():
    assert {kind for kind, _ in KINDS} == set(OWNERS)


def event(name: str, start: float, end: float) -> Event:
    return Event(name=name, start=start, end=end)


EVENTS = [
    event("nvjet_1", 0, 40),
    event("nccl_reduce", 30, 60),  # hidden for 10, bare for 20
    event("rms_norm_fwd_kernel", 60, 70),
    event("rms_norm_fwd_kernel", 65, 75),  # on another stream
    event("flash_bwd", 80, 100),
]
WORK = Work(flops=9.89e9, attention_flops=0.0, params=10**6, tokens=1000, device="NVIDIA H100 80GB")


def test_instants_add_up():
    times = owned(EVENTS)
    assert times == {
        "matmul": 40,
        "attention": 20,
        "optimizer": 0,
        "memory-bound": 15,
        "copies": 0,
        "communication": 20,
    }
    assert union([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert gaps(EVENTS) == [(5, "rms_norm_fwd_kernel", "flash_bwd")]


def test_page():
    text = page(EVENTS, wall=100.0, steps=1, work=WORK, concurrent=True, note="Two of them.")
    assert "0.10 ms a step, 10,000,000 tokens/s, MFU 10.0%; 1 steps, 5 kernels a step." in text
    assert "| matmul | 0.04 | 40.0% | 0.01 | 25% |" in text
    assert "| idle | 0.01 | 5.0% | - | - |" in text
    assert "| 0.040 | 1 | matmul | nvjet_1 |" in text
    assert len(text.splitlines()) < 60


def test_floors_of_known_devices():
    found = floors(Work(flops=3e15, attention_flops=1e15, params=10**9, tokens=1, device="H100"))
    assert found["matmul"] == pytest.approx(2e6 * 1e15 / 989e12)
    assert found["attention"] == pytest.approx(1e6 * 1e15 / 989e12)
    assert found["optimizer"] == pytest.approx(28e15 / 3.35e12)
    assert floors(Work(flops=1, attention_flops=0, params=1, tokens=1, device="cpu")) == {}
    assert bandwidth("NVIDIA H200") == 4.8e12
    assert bandwidth("NVIDIA H100 PCIe") == 2.0e12


def test_files_of_a_run(configure, tmp_path):
    typed = ("train.profile=true", "train.profile_first=2", "train.profile_steps=2")
    train(configure("run", *typed))
    folder = tmp_path / "run" / "profile"
    text = (folder / "profile.md").read_text()
    assert "Steps 2 to 3 of a start on cpu" in text
    shares = {
        cells[1]: float(cells[3].rstrip("%"))
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 7 and "%" in cells[3]
    }
    assert set(shares) == {*OWNERS, "idle"}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares["matmul"] > 1
    assert shares["optimizer"] > 0
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {line.get("name") for line in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "train" for line in lines) == 3


def test_the_losses_are_the_same(configure, tmp_path):
    for name, typed in (("plain", ()), ("profiled", ("train.profile=true",))):
        train(configure(name, *typed, "train.profile_first=3") if typed else configure(name))
    plain, profiled = (
        (tmp_path / name / "ledger.jsonl").read_text() for name in ("plain", "profiled")
    )
    assert plain == profiled


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train.profile_steps=2"], "has no effect with train.profile=false"),
        (["train.profile=true", "train.total_tokens=131072"], "within the 2 steps of the run"),
        (["train.profile=true", "train.profile_steps=0"], "train.profile_steps: got 0"),
    ],
)
def test_what_is_mistyped(typed, said):
    with pytest.raises(ValueError, match=said):
        compose("train", typed)
