"""Saving in the background: what is written, what is waited for, and what happens when it fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint
from llmtrain.distributed import World
from llmtrain.manifest import rank_file
from llmtrain.train import checkpoint as writing
from llmtrain.train import image, saving
from llmtrain.train.checkpoint import CheckpointWriter, SaveFailed
from llmtrain.train.loop import train
from llmtrain.train.partitions import Fragment
from llmtrain.train.saving import Saver

ALONE = World(rank=0, size=1, local_rank=0)
NUMEL = 40_000


def state() -> tuple[list[Fragment], dict[str, torch.Tensor], dict]:
    """Fragments, generators and counters, as a run has them."""
    draw = torch.Generator().manual_seed(0)
    views = {kind: torch.randn(NUMEL, generator=draw) for kind in ("param", "momentum")}
    fragments = [
        Fragment(name="model.a", offset=0, views=views),
        Fragment(name="model.b", offset=0, views={"param": torch.arange(5)}),
    ]
    return fragments, {"rng_cpu": torch.arange(9, dtype=torch.uint8)}, {"step": 1, "skips": [1, 2]}


@pytest.fixture
def make_saver(tmp_path) -> Iterator[Callable[..., Saver]]:
    """make_saver("run", background=True, failures=3, keep=9): of a run in tmp_path / "run"."""
    made = []

    def make(name: str = "run", *, background=True, failures=3, **knobs) -> Saver:
        writer = CheckpointWriter(
            tmp_path / name,
            ALONE,
            config={"seed": 1},
            vocab_size=11,
            parameters={"model.a": (NUMEL // 4, 4), "model.b": (5,)},
            corpus_files={},
            **{"keep": 9, **knobs},
        )
        made.append(Saver(writer, background=background, failures=failures))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Files are not written before this event is set."""
    opened, write_file = threading.Event(), writing.write_file

    def wait_and_write(*arguments, **options):
        assert opened.wait(60)
        return write_file(*arguments, **options)

    monkeypatch.setattr(writing, "write_file", wait_and_write)
    return opened


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("chunk", [4096, 2**26])
def test_background_writes_what_the_foreground_writes(make_saver, monkeypatch, chunk):
    for module in (image, writing):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    savers = [make_saver(name, background=name == "back") for name in ("back", "front")]
    for saver in savers:
        saver.save(3, *state())
        saver.finish()
    back, front = (files(saver.writer.path(3)) for saver in savers)
    assert back == front
    assert len(back) == 4
    checkpoint.verify(savers[0].writer.path(3))


def test_training_that_goes_on_changes_nothing(make_saver, gate):
    saver, plain = make_saver(), make_saver("plain")
    fragments, generators, trainer = state()
    saver.save(1, fragments, generators, trainer)
    for fragment in fragments:
        for view in fragment.views.values():
            view.zero_()
    generators["rng_cpu"].zero_()
    trainer["skips"].append(3)
    gate.set()
    saver.finish()
    plain.save(1, *state())
    plain.finish()
    assert files(saver.writer.path(1)) == files(plain.writer.path(1))


def test_not_announced_before_it_is_durable(make_saver, gate):
    saver = make_saver()
    saver.save(1, *state())
    assert saver.take_finished() == []
    assert checkpoint.list_checkpoints(saver.writer.run_dir) == []
    gate.set()
    saver.settle()
    (save,) = saver.take_finished()
    assert (save.step, save.failure) == (1, None)
    assert checkpoint.list_checkpoints(saver.writer.run_dir) == [(1, saver.writer.path(1))]
    metrics = save.metrics()
    assert metrics["bytes"] == (saver.writer.path(1) / rank_file(0)).stat().st_size
    assert metrics["bytes_per_second"] == metrics["bytes"] / metrics["write_seconds"]
    assert saver.take_finished() == []


def test_next_save_waits_for_the_one_before_and_says_so(make_saver, gate, caplog, monkeypatch):
    monkeypatch.setattr("llmtrain.train.saving.LONG_WAIT", 0.2)
    saver = make_saver()
    fragments, generators, trainer = state()
    saver.save(1, fragments, generators, trainer)
    assert saver.latest.stall_seconds < 0.3
    threading.Timer(0.5, gate.set).start()
    fragments[0].views["param"].zero_()
    saver.save(2, fragments, generators, trainer)  # would spoil the memory of the first
    assert saver.latest.stall_seconds > 0.4
    assert "step 2: training waited 0." in caplog.text
    saver.finish()
    first, second = (
        checkpoint.FragmentReader(saver.writer.path(step)).ranks_key for step in (1, 2)
    )
    assert torch.equal(first("rng_cpu", 0), second("rng_cpu", 0))
    outs = []
    for step in (1, 2):
        outs.append(torch.empty(NUMEL))
        checkpoint.FragmentReader(saver.writer.path(step)).read("param", "model.a", 0, outs[-1])
    assert torch.equal(outs[0], state()[0][0].views["param"])
    assert not outs[1].any()


def test_wait_for_the_last_save_is_no_stall(make_saver, gate):
    saver = make_saver()
    saver.save(1, *state())
    threading.Timer(0.5, gate.set).start()
    saver.finish()
    (save,) = saver.take_finished()
    assert save.stall_seconds < 0.3
    assert save.metrics()["end_wait_seconds"] > 0.3


def test_host_memory_is_allocated_once_and_fits_other_fragments(make_saver):
    saver = make_saver()
    fragments, generators, trainer = state()
    saver.reserve(fragments, generators)
    memory = saver.reservation.result()
    assert memory.bytes.data_ptr() % 4096 == 0
    saver.save(1, fragments, generators, trainer)
    saver.save(2, *state())
    assert saver.memory is memory
    views = {"param": torch.arange(5), "momentum": torch.ones(5)}
    others = [fragments[0], Fragment(name="model.b", offset=0, views=views)]
    saver.save(3, others, generators, trainer)
    saver.finish()
    assert saver.memory is not memory
    for step in (1, 2, 3):
        checkpoint.verify(saver.writer.path(step))


def test_reserved_memory_that_no_save_wanted_is_released(make_saver):
    saver = make_saver()
    fragments, generators, _ = state()
    saver.reserve(fragments, generators)
    saver.close()
    assert saver.memory is saver.reservation is None


def test_memory_that_cannot_be_had_is_told_by_the_save(make_saver, monkeypatch):
    saver = make_saver()

    def refuse(image):
        raise MemoryError("15 GiB")

    monkeypatch.setattr(saving, "host_memory", refuse)
    fragments, generators, trainer = state()
    saver.reserve(fragments, generators)
    with pytest.raises(MemoryError, match="15 GiB"):
        saver.save(1, fragments, generators, trainer)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of one MiB at tmp_path / "disk"."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk(small_disk, make_saver, caplog):
    """A real one: told, counted, tried again; earlier checkpoints stay, nothing is left behind."""
    saver = make_saver("disk/run")
    saver.save(1, *state())
    saver.finish()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(small_disk.stat().st_blksize * 100))
    saver.save(2, *state())
    with pytest.raises(
        SaveFailed,
        match=r"checkpoint of step 2: could not be written .*rank 0: \[Errno 28\] No space left.*"
        r"untouched \(the last one is .*step-00000001\)",
    ):
        saver.finish()
    assert "failure 1 in a row; training ends at 3" in caplog.text
    assert (saver.failed, saver.failed_in_a_row, saver.exhausted) == (1, 1, False)
    folder = saver.writer.folder
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001"]
    assert (folder / "latest").read_text() == "step-00000001\n"
    checkpoint.verify(saver.writer.path(1))
    filler.unlink()
    saver.save(3, *state())
    saver.finish()
    assert (saver.failed, saver.failed_in_a_row) == (1, 0)
    checkpoint.verify(saver.writer.path(3))
    assert [save.failure is None for save in saver.take_finished()] == [True, False, True]


def test_file_size_limit(make_saver):
    """Another real failure of write(): the process may not write files of that size."""
    saver = make_saver()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NUMEL, hard))
    try:
        saver.save(1, *state())
        saver.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in str(saver.latest.failure)
    saver.save(2, *state())
    saver.finish()


@pytest.mark.parametrize("background", [True, False])
def test_failures_in_a_row_end_the_run(make_saver, monkeypatch, background):
    saver = make_saver(background=background, failures=2)
    monkeypatch.setattr(writing, "write_file", no_space)
    saver.save(1, *state())
    saver.settle()
    assert not saver.exhausted
    saver.save(2, *state())
    with pytest.raises(
        SaveFailed, match=r"the last 2 saves failed.*train.save_failures=2.*of step 2: could not"
    ):
        saver.settle()
    assert saver.exhausted


def no_space(*_, **__) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_of_our_own_in_the_thread_is_raised(make_saver, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a connection was lost")

    saver = make_saver()
    monkeypatch.setattr(writing, "gather_objects", fail)
    saver.save(1, *state())
    with pytest.raises(RuntimeError, match="a connection was lost"):
        saver.settle()
    assert saver.exhausted


def test_closing_waits_for_what_is_being_written(make_saver, gate):
    saver = make_saver()
    saver.save(1, *state())
    threading.Timer(0.3, gate.set).start()
    saver.close()
    checkpoint.verify(saver.writer.path(1))


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def same_files(first: Path, second: Path) -> bool:
    names = {file.name for file in first.iterdir() if file.name.startswith(("rank", "token"))}
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_training_in_the_background_and_not(configure, tmp_path, capsys):
    """The same files; and what the logs say about saves."""
    for name in ("back", "front"):
        train(configure(name, f"train.async_save={str(name == 'back').lower()}", "train.keep=9"))
        saves = [line for line in lines(tmp_path / name, "metrics") if line["kind"] == "save"]
        assert [line["step"] for line in saves] == [5, 10, 12]
        for line in saves:
            assert line["bytes"] > 100_000
            assert line["write_seconds"] > 0
            assert line["stall_seconds"] > 0
        assert "save 5/12 | durable, " in capsys.readouterr().out
    for step in ("05", "10", "12"):
        path = f"checkpoints/step-000000{step}"
        assert same_files(tmp_path / "back" / path, tmp_path / "front" / path)
    run_id = (tmp_path / "back" / "run_id").read_text().strip()
    trainer = tmp_path / "back" / "checkpoints" / "step-00000005" / "trainer.json"
    assert json.loads(trainer.read_text())["run_id"] == run_id


def test_training_goes_on_though_the_disk_is_full(small_disk, configure, caplog):
    """Full from the second save on, logs included, until the third; then all of it is there."""
    run_dir, filler = small_disk / "run", small_disk / "filler"

    def fill_and_free() -> None:
        while not (run_dir / "checkpoints" / "step-00000005").exists():
            time.sleep(0.001)
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 512, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
        while "could not be written" not in caplog.text:
            time.sleep(0.001)
        filler.unlink()

    thread = threading.Thread(target=fill_and_free)
    thread.start()
    summary = train(
        configure(
            "unused",
            f"run_dir={run_dir}",
            "train.total_tokens=12800",
            "train.save_failures=9",
            "train.keep=1",
            "train.val_every=1000",
        )
    )
    thread.join()
    assert summary["finished"]
    assert summary["save_failures"] >= 1
    checkpoint.verify(run_dir / "checkpoints" / "step-00000050")
    ledger = lines(run_dir, "ledger")
    assert [line["step"] for line in ledger if "event" not in line] == list(range(1, 51))
    failed = [line for line in ledger if line.get("event") == "save_failed"]
    assert len(failed) == summary["save_failures"]
    assert "No space left on device" in failed[0]["reason"]


def test_run_ends_after_failures_in_a_row(configure, tmp_path, monkeypatch):
    real = writing.write_file

    def fail_later(path, *arguments, **options):
        if path.parent.name == ".tmp-step-00000005":
            return real(path, *arguments, **options)
        return no_space()

    monkeypatch.setattr(writing, "write_file", fail_later)
    options = ("train.total_tokens=25600", "train.save_failures=2")
    with pytest.raises(SaveFailed, match=r"the last 2 saves failed"):
        train(configure("run", *options))
    steps = [line["step"] for line in lines(tmp_path / "run", "ledger") if "event" not in line]
    assert 15 <= steps[-1] <= 25
    monkeypatch.undo()
    assert train(configure("run", *options))["finished"]
    assert lines(tmp_path / "run", "starts")[1]["resumed_step"] == 5


def test_killed_in_the_middle_of_a_save(workers, corpus, small, configure, tmp_path):
    """SIGKILL when half of a file is written; the same command continues bit for bit."""
    options = ("train.keep=9", "train.total_tokens=5120")
    run_dir = f"run_dir={tmp_path / 'killed'}"
    workers("kill_worker.py", 1, 10, *corpus, *small, *options, run_dir, ok=False)
    folder = tmp_path / "killed" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".tmp-step-00000010",
        "latest",
        "step-00000005",
    ]
    assert (folder / ".tmp-step-00000010" / rank_file(0)).stat().st_size > 0
    for name in ("killed", "straight"):
        train(configure(name, *options))
    assert lines(tmp_path / "killed", "starts")[1]["resumed_step"] == 5
    assert not list(folder.glob(".tmp-*"))
    for step in ("10", "15", "20"):
        last = f"checkpoints/step-000000{step}"
        assert same_files(tmp_path / "killed" / last, tmp_path / "straight" / last)
    ledgers = [lines(tmp_path / name, "ledger") for name in ("killed", "straight")]
    assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_two_ranks_one_killed_in_the_middle_of_a_save(workers, corpus, small, tmp_path):
    """... and continued; and ranks that train while one of them still writes."""
    options = (*corpus, *small, "train.keep=9", "train.total_tokens=3840", "deepspeed=zero2")
    workers("kill_worker.py", 2, 10, *options, f"run_dir={tmp_path / 'killed'}", ok=False)
    folder = tmp_path / "killed" / "checkpoints"
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "killed")] == [5]
    assert (folder / ".tmp-step-00000010" / rank_file(1)).stat().st_size > 0
    workers("save_worker.py", 2, tmp_path, *options)
    assert lines(tmp_path / "killed", "starts")[1]["resumed_step"] == 5
    for step in ("10", "15"):
        last = f"checkpoints/step-000000{step}"
        assert same_files(tmp_path / "killed" / last, tmp_path / "slow" / last)
    assert lines(tmp_path / "killed", "ledger") == lines(tmp_path / "slow", "ledger")
    assert not list(folder.glob(".tmp-*"))
    assert (tmp_path / "slow.txt").read_text() == "[]"
    assert (tmp_path / "slow" / "checkpoints" / "step-00000005").is_dir()
