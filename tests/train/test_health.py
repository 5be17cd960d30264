"""Ranks that drift apart are found before anything is saved; slow ranks are named."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint
from llmtrain.config import compose
from llmtrain.distributed import World
from llmtrain.train import health, stragglers
from llmtrain.train.health import Comparison, fingerprint, multipliers, replicated
from llmtrain.train.processes import Identity
from llmtrain.train.stragglers import StepClock, Stragglers, own_work_ends, stand_out
from llmtrain.train.zero import Zero0, Zero1, Zero2

CPU = torch.device("cpu")
FLIPPED = "model.stack.blocks.1.channel.down.weight"
HOST = socket.gethostname()


def ranks(count: int) -> list[Identity]:
    return [
        Identity(rank=r, host=f"node{r}", pid=100 + r, job=None, boot=f"boot{r}", started=1)
        for r in range(count)
    ]


def number(tensor: torch.Tensor) -> int:
    return int(fingerprint(tensor, multipliers(100, CPU)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_every_bit_of_a_tensor_counts(dtype):
    torch.manual_seed(0)
    tensor = torch.randn(7, 5).mul(3).to(dtype)
    expected = number(tensor)
    assert number(tensor.clone()) == expected
    assert number(tensor.t().contiguous().t()) == expected
    whole = tensor.reshape(-1).view(torch.uint8)
    for byte in range(len(whole)):
        bit = 1 if dtype == torch.bool else 1 << (byte % 8)
        whole[byte] ^= bit
        assert number(tensor) != expected
        whole[byte] ^= bit
    assert number(tensor) == expected


def test_order_of_elements_and_chunks_counts(monkeypatch):
    tensor = torch.arange(1.0, 97.0)
    swapped = tensor.clone()
    swapped[[3, 90]] = tensor[[90, 3]]
    assert number(tensor) != number(swapped)
    monkeypatch.setattr(health, "CHUNK", 16)
    moved = tensor.roll(16)  # whole chunks change places
    assert len({number(tensor), number(swapped), number(moved)}) == 3
    assert number(tensor) == number(tensor.clone())


def test_multipliers_are_odd_and_different():
    weights = multipliers(100_000, CPU)
    assert bool((weights % 2 != 0).all())
    assert len(weights.unique()) == 100_000
    # splitmix64 of seed 0, its first outputs (with the lowest bit set)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(w) % (1 << 64) for w in weights[:3]] == [p | 1 for p in published]


def compared(numbers: list[list[int]], names: list[str]) -> str:
    """The message of a comparison of ranks with these numbers."""
    module = torch.nn.Linear(2, 2)
    world = World(rank=0, size=len(numbers), local_rank=0)
    comparison = Comparison(module, world, ranks(len(numbers)), config={}, corpus="")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, row in enumerate(numbers):
        groups.setdefault(tuple(row), []).append(rank)
    return comparison.message(40, names, groups)


def test_minority_is_named_with_what_differs():
    names = ["step", "a", "b", "c", "d"]
    good = [1, 2, 3, 4, 5]
    said = compared([good, [1, 9, 9, 9, 9], good, [1, 2, 3, 4, 0]], names)
    assert "after step 40; no majority tells who is right" in said  # 2 of 4
    said = compared([good, [1, 9, 9, 9, 9], good, [1, 2, 3, 4, 0], good], names)
    assert "these differ from most ranks" in said
    assert "rank 1 (host node1, pid 101) in 4 of 5 tensors and counters: a, b, c, ..." in said
    assert "rank 3 (host node3, pid 103) in 1 of 5 tensors and counters: d" in said
    said = compared([good, [2, 2, 3, 4, 5]], names)
    assert "no majority" in said
    assert "differ: rank 1 (host node1, pid 101) in 1 of 5 tensors and counters: step" in said


def test_what_is_replicated():
    module = torch.nn.BatchNorm1d(3)
    assert set(replicated(module)) == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    module.weight.ds_id, module.weight.ds_persist = 0, False  # as ZeRO-3 marks them
    module.bias.ds_id, module.bias.ds_persist = 1, True
    assert "weight" not in replicated(module)
    assert "bias" in replicated(module)


def test_who_stands_out():
    assert stand_out([1.0, 1.0, 1.0, 1.5], 1.3) == {3: 1.5}
    assert stand_out([1.0, 1.6], 1.3) == {1: 1.6}
    assert stand_out([1.0, 1.0, 1.2, 1.0], 1.3) == {}
    assert stand_out([0.010, 0.010, 0.040], 1.3) == {}  # noise of tiny steps
    assert stand_out([1.0, 1.4, 0.7, 1.3, 0.8, 1.1], 1.3) == {}  # all ranks vary that much
    assert stand_out([0.0, 0.0, 0.3], 1.3, beside=1.0) == {}
    assert stand_out([0.0, 0.0, 0.5], 1.3, beside=1.0) == {2: 1.5}
    assert stand_out([0.0, 0.0, 0.0], 1.3) == {}


def watched(count: int = 3) -> Stragglers:
    world = World(rank=0, size=count, local_rank=0)
    return Stragglers(world, ranks(count), CPU, factor=1.3, ends="backward")


def test_changes_are_told_once():
    found = watched()
    healthy, slow = [[1.0, 0.0]] * 3, [[1.0, 0.0], [1.0, 0.0], [1.8, 0.0]]
    hungry = [[1.0, 0.9], [1.0, 0.0], [1.0, 0.0]]
    assert found.judge(healthy) == []
    (told,) = found.judge(slow)
    assert (told.rank, told.cause, told.slow, told.factor) == (2, "compute", True, 1.8)
    assert "rank 2 (host node2) computes 1.800 s a step, the median rank 1.000 s" in str(told)
    assert found.judge(slow) == []
    ended, began = found.judge(hungry)
    assert (ended.rank, ended.slow) == (2, False)
    assert "rank 2 (host node2) computes as fast as the others again" in str(ended)
    assert (began.rank, began.cause, began.factor) == (0, "data", pytest.approx(1.9))
    assert "rank 0 (host node0) waits for data 0.900 s a step" in str(began)
    assert [told.slow for told in found.judge(healthy)] == [False]


def test_intervals_are_long_enough_and_without_the_first_step(monkeypatch):
    found, gathered = watched(), []

    def gather(rows: torch.Tensor, own: torch.Tensor) -> None:
        gathered.append(own.tolist())
        rows.copy_(own.repeat(3))

    monkeypatch.setattr(stragglers.dist, "all_gather_into_tensor", gather)
    clock = iter([float(2**i) for i in range(40)])
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: next(clock))
    for step, waited in enumerate([50.0, 0.1, 0.2, 0.3, 0.4], start=5):
        found.begin(step, waited)
        found.clock.lap("forward")
        found.clock.lap("backward")
        found.clock.lap("backward")  # of evaluation, say: no step has begun
        found.interval(step)
    # own work: 2-1, 8-4, 32-16, 128-64; the first step began no interval
    assert gathered == [[pytest.approx((4 + 16) / 2), pytest.approx(0.25)]]


def test_clock_of_a_stage():
    bucket = {"communication_dtype": "fp32", "reduce_bucket_size": 700}
    assert own_work_ends(Zero0(communication_dtype="fp32")) == "backward"
    assert own_work_ends(Zero1(**bucket, overlap_comm=False)) == "backward"
    assert own_work_ends(Zero1(**bucket, overlap_comm=True)) == "forward"
    assert own_work_ends(Zero2(**bucket, overlap_comm=False)) == "forward"
    assert own_work_ends(compose_zero3()) is None
    clock = StepClock(CPU, None)
    clock.begin(1)
    clock.lap("backward")
    assert clock.seconds(1) == []


def compose_zero3():
    from llmtrain import build

    return build.part(compose("train", ["deepspeed=zero3"])["deepspeed"], "deepspeed=zero3")


def test_one_rank_gathers_nothing():
    alone = World(rank=0, size=1, local_rank=0)
    found = Stragglers(alone, ranks(1), CPU, factor=1.3, ends="backward")
    for step in range(1, 20):
        found.begin(step, 0.5)
        found.clock.lap("backward")
        assert found.interval(step) == []
    assert not found.clock.taken
    assert not found.waits


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("health.hang_seconds=0", "health.hang_seconds: got 0, expected more than 0"),
        ("health.first_step_seconds=null", "health.first_step_seconds: got null"),
        ("health.compare_every=-1", "health.compare_every: got -1"),
        ("health.straggler_factor=1.0", "health.straggler_factor: got 1.0, expected more than 1"),
    ],
)
def test_settings_are_checked(override, message):
    with pytest.raises(ValueError, match=message):
        compose("train", [override])
    key = override.partition("=")[0]
    if key != "health.first_step_seconds":
        compose("train", [f"{key}=null"])


def lines(run_dir: Path, name: str, **fields: object) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [line for line in found if all(line.get(k) == v for k, v in fields.items())]


@pytest.mark.slow
def test_three_ranks(workers, corpus, small, tmp_path):
    """One launch: a healthy training, a flipped bit, a slow rank and one that waits for data."""
    smaller = ("train.global_batch_tokens=192", "train.micro_batch=2", "train.total_tokens=2304")
    workers("health_worker.py", 3, tmp_path, *corpus, *small, *smaller)

    run_dir = tmp_path / "healthy"
    assert [step for step, _ in checkpoint.list_checkpoints(run_dir)] == [5, 10, 12]
    assert lines(run_dir, "metrics", kind="health") == []
    assert not (run_dir / "hangs").exists()

    for stage, step in (("zero0", 8), ("zero3", 7)):
        said = [(tmp_path / f"{stage}-rank{rank}.txt").read_text() for rank in range(3)]
        assert said[0] == said[1] == said[2]
        assert f"do not hold the same weights after step {step}; these differ from m" in said[0]
        named = said[0].partition("these differ")[2]
        assert f"rank 1 (host {HOST}, pid" in named
        assert FLIPPED in named
        if stage == "zero3":
            assert re.search(rf"in 1 of \d+ tensors and counters: {FLIPPED}\. Nothing", named)
        saved = [step for step, _ in checkpoint.list_checkpoints(tmp_path / stage)]
        assert saved == [5]

    run_dir = tmp_path / "slow"
    told = lines(run_dir, "metrics", kind="health")
    for rank, cause in ((1, "compute"), (2, "data")):
        began, ended = (line for line in told if line["cause"] == cause)
        assert (began["rank"], began["slow"]) == (rank, True)
        assert (ended["rank"], ended["slow"]) == (rank, False)
        assert began["host"] == HOST
        assert (began["step"], ended["step"]) == (8, 12)
        assert began["factor"] > 2
        said = f"step {began['step']}: rank {rank} (host {HOST})"
        assert said in (run_dir / "run.log").read_text()
    ledger = [{k: v for k, v in line.items() if k != "kind"} for line in told]
    assert lines(run_dir, "ledger", event="straggler") == ledger
    assert checkpoint.list_checkpoints(run_dir)[-1][0] == 12
