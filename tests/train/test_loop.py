"""Whole trainings of a small model, on one rank in this process."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from llmtrain import checkpoint
from llmtrain.checkpoint import FragmentReader, load_model
from llmtrain.data.batch import MicroBatch
from llmtrain.data.loader import TokenLoader
from llmtrain.exits import RunFailed
from llmtrain.objectives.causal import Causal
from llmtrain.train import resume
from llmtrain.train.engine import Engine
from llmtrain.train.loop import train

STEPS, ROWS = 12, 8


def lines(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def steps_of(run_dir: Path) -> list[int]:
    return [step for step, _ in checkpoint.list_checkpoints(run_dir)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter and moment of a checkpoint, flattened."""
    reader = FragmentReader(path)
    found = {}
    for kind, name in reader.index:
        if not kind.startswith("rng"):
            shape = torch.Size(reader.manifest.parameters[name])
            found[f"{kind}|{name}"] = out = torch.empty(shape.numel())
            reader.read(kind, name, 0, out)
    return found


def same(first: Path, second: Path) -> bool:
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def signal_at(run_dir: Path, step: int, number: int) -> threading.Thread:
    """Send this process a signal once the run's ledger holds that step."""

    def watch() -> None:
        ledger = run_dir / "ledger.jsonl"
        while not ledger.exists() or len(ledger.read_text().splitlines()) < step:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def corrupt(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_run_folder_and_summary(configure, tmp_path, capsys):
    config = configure("run")
    summary = train(config)
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["finished"]
    assert summary["tokens"] == STEPS * 256
    assert steps_of(run_dir) == [5, 10, 12]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000012\n"

    metrics = lines(run_dir, "metrics")
    kinds = [(line["step"], line["kind"]) for line in metrics]
    others = [(6, "val"), (12, "val"), (5, "save"), (10, "save"), (12, "save")]
    assert sorted(kinds) == sorted([(4, "train"), (8, "train"), (12, "train"), *others])
    metrics = [line for line in metrics if line["kind"] != "save"]
    expected = {
        "loss",
        "bits_per_byte",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
        "guard/skipped",
        "guard/rollbacks",
    }
    expected |= {"memory_gib", "data_wait_seconds", "step_seconds"}
    assert all(expected <= line.keys() for line in metrics if line["kind"] == "train")
    losses = [line["loss"] for line in metrics if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.2

    ledger = lines(run_dir, "ledger")
    assert [line["step"] for line in ledger] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in ledger][:2] == [[0, ROWS], [ROWS, 2 * ROWS]]
    mean = sum(line["loss"] * line["tokens"] for line in ledger[4:8])
    mean /= sum(line["tokens"] for line in ledger[4:8])
    assert losses[1] == pytest.approx(mean)
    saves = [line for line in metrics if line["kind"] == "save"]
    assert all(line["bytes"] > 0 and line["stall_seconds"] >= 0 for line in saves)

    (start,) = lines(run_dir, "starts")
    assert start["seed"] == 0
    assert start["deepspeed"]["gradient_clipping"] == 0.0
    assert {"torch", "deepspeed", "python"} <= start["versions"].keys()
    assert start["backends"] == {"mixer a": "sdpa"}
    printed = capsys.readouterr().out
    assert "optimizer groups" in printed
    assert "kernel backends  mixer a: sdpa" in printed
    assert "train 4/12 | loss" in printed


def test_trained_model_loads_with_the_loss_that_was_measured(configure, tmp_path):
    config = configure("run")
    summary = train(config)
    loaded = load_model(tmp_path / "run")
    assert loaded.step == STEPS
    assert loaded.config["train"] == config["train"]
    assert loaded.tokenizer_file.exists()
    corpus = Path(config["data"]["root"]) / "text"
    loader = TokenLoader.open(corpus, "val", seq_len=32, seed=0)
    batch = loader.batch(0, min(300 // 32, loader.rows_per_epoch))
    micro = MicroBatch.of(batch, mask_documents=True)
    with torch.no_grad():
        out = Causal()(loaded.model, micro.tokens_BT, micro.targets_BT, micro.weights_BT, micro.ctx)
    bits = out.ce_sum / torch.log(torch.tensor(2.0))
    counted = (loaded.token_bytes[micro.targets_BT] * micro.weights_BT).sum()
    assert summary["val"]["loss"] == pytest.approx(float(out.ce_sum / out.weight_sum), rel=1e-5)
    assert summary["val"]["bits_per_byte"] == pytest.approx(float(bits / counted), rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("zero0", signal.SIGTERM),
        ("zero1", signal.SIGUSR2),
        ("zero2", signal.SIGTERM),
        ("zero3", signal.SIGINT),
    ],
)
def test_signal_saves_and_the_same_command_continues_bit_for_bit(
    configure, tmp_path, stage, number
):
    options = (f"deepspeed={stage}", "train.total_tokens=10240", "train.keep=9")
    options += ("train.val_every=1",)  # the step of the stop too
    straight, broken = (configure(name, *options) for name in ("straight", "broken"))
    train(straight)
    before = signal.getsignal(number)
    watcher = signal_at(tmp_path / "broken", 3, number)
    stopped = train(broken)
    watcher.join()
    assert signal.getsignal(number) is before
    assert not stopped["finished"]
    assert 3 <= stopped["step"] < 40
    assert steps_of(tmp_path / "broken")[-1] == stopped["step"]
    assert train(broken)["finished"]
    runs = tmp_path / "straight", tmp_path / "broken"
    assert lines(runs[0], "ledger") == lines(runs[1], "ledger")
    validated = [[x for x in lines(run, "metrics") if x["kind"] == "val"] for run in runs]
    assert len(validated[0]) == 40
    assert validated[0] == validated[1]
    last = "checkpoints/step-00000040"
    assert same(runs[0] / last, runs[1] / last)
    assert lines(runs[1], "starts")[1]["resumed_step"] == stopped["step"]


def test_signal_counts_though_a_library_took_its_handler(configure, tmp_path, monkeypatch):
    """Micro-batch 5 (step 3) stands for a compiler that sets a handler, 9 (step 5) for Slurm."""
    stolen, calls, accumulate = [], [], Engine.accumulate

    def accumulate_with_events(self, micro, **how):
        calls.append(micro)
        if len(calls) == 5:
            signal.signal(signal.SIGTERM, lambda number, frame: stolen.append(number))
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        accumulate(self, micro, **how)

    monkeypatch.setattr(Engine, "accumulate", accumulate_with_events)
    summary = train(configure("run"))
    assert (summary["finished"], summary["step"], stolen) == (False, 5, [])
    assert steps_of(tmp_path / "run") == [5]


def test_finished_run_started_again_adds_nothing(configure, tmp_path):
    config = configure("run")
    first = train(config)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("rank-*")}
    again = train(config)
    assert again["step"] == first["step"]
    assert again["val"] == first["val"]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(lines(tmp_path / "run", "ledger")) == STEPS
    kinds = [(line["step"], line["kind"]) for line in lines(tmp_path / "run", "metrics")]
    assert kinds.count((STEPS, "val")) == 1
    assert len(kinds) == len(set(kinds))


def test_file_in_the_place_of_a_checkpoint_is_named_and_set_aside(configure, tmp_path, caplog):
    config = configure("run", "train.keep=1", "train.total_tokens=1280")  # 5 steps
    train(config)
    place = tmp_path / "run" / "checkpoints" / "step-00000010"
    place.write_text("not a folder")
    summary = train(configure("run", "train.keep=1"))
    assert (summary["finished"], steps_of(tmp_path / "run")) == (True, [STEPS])
    assert re.search(r"step-00000010.*Not a directory", caplog.text)
    assert "step-00000010 is not continued, and now named" in caplog.text
    assert not list(place.parent.glob("*superseded*"))


def test_folder_in_the_place_of_latest_is_set_aside(configure, tmp_path, caplog):
    train(configure("run", "train.total_tokens=1280"))  # 5 steps
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.unlink()
    latest.mkdir()
    (latest / "note").write_text("mine")
    assert train(configure("run"))["finished"]
    assert latest.read_text().strip() == f"step-{STEPS:08d}"
    assert (latest.with_name("latest-1") / "note").read_text() == "mine"
    assert "latest is a folder, expected a file, and now named latest-1" in caplog.text


def test_start_deletes_what_a_kill_kept_the_last_one_from_deleting(configure, tmp_path):
    config = configure("run", "train.keep=1")
    train(config)
    last = checkpoint.newest_good(tmp_path / "run")
    shutil.copytree(last, last.with_name("step-00000001"))
    assert steps_of(tmp_path / "run") == [1, STEPS]
    train(config)
    assert steps_of(tmp_path / "run") == [STEPS]


def test_interval_that_a_restart_falls_into_is_averaged_whole(configure, tmp_path):
    """Steps 5 to 8 are one line; the checkpoint that is continued was made after step 5."""
    train(configure("straight"))
    resume_from = tmp_path / "straight" / "checkpoints" / "step-00000005"
    train(configure("again", f"train.resume={resume_from}"))
    first, again = (lines(tmp_path / name, "metrics") for name in ("straight", "again"))
    for name in ("loss", "bits_per_byte", "grad_norm"):
        expected = [x[name] for x in first if x["kind"] == "train" and x["step"] > 5]
        got = [line[name] for line in again if line["kind"] == "train"]
        assert got == expected, name


def test_longer_run_continues_and_logs_are_cut_at_the_checkpoint(configure, tmp_path):
    train(configure("run"))
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "step-00000012"
    corrupt(last / "rank-00000.safetensors")
    with (run_dir / "ledger.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1')  # cut off by a crash
    summary = train(configure("run", "train.total_tokens=4096", "deepspeed=zero2"))
    assert summary["step"] == 16
    assert [line["step"] for line in lines(run_dir, "ledger")] == list(range(1, 17))
    steps = [line["step"] for line in lines(run_dir, "metrics") if line["kind"] == "train"]
    assert steps == [4, 8, 12, 16]
    assert lines(run_dir, "starts")[1]["resumed_from"].endswith("step-00000010")


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(configure, tmp_path, caplog):
    train(configure("run"))
    run_dir = tmp_path / "run"
    corrupt(run_dir / "checkpoints" / "step-00000012" / "rank-00000.safetensors")
    with caplog.at_level("WARNING"):
        train(configure("run"))
    assert "step-00000012: rank-00000.safetensors is damaged: got sha256" in caplog.text
    assert "superseded" in caplog.text
    assert steps_of(run_dir) == [5, 10, 12]
    checkpoint.verify(run_dir / "checkpoints" / "step-00000012")


def test_explicit_damaged_checkpoint_is_refused(configure, tmp_path):
    train(configure("run"))
    path = tmp_path / "run" / "checkpoints" / "step-00000010"
    corrupt(path / "rank-00000.safetensors")
    with pytest.raises(
        ValueError, match=r"step-00000010: rank-00000.* is damaged: got sha256 .*use another"
    ):
        train(configure("other", f"train.resume={path}"))


def test_only_damaged_checkpoints_do_not_start_over_silently(configure, tmp_path):
    train(configure("run", "train.keep=1"))
    run_dir = tmp_path / "run"
    assert steps_of(run_dir) == [12]
    (run_dir / "checkpoints" / "step-00000012" / "trainer.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged .*train.resume=never"):
        train(configure("run", "train.keep=1"))


def test_resume_from_a_path_and_from_scratch(configure, tmp_path):
    train(configure("first"))
    path = tmp_path / "first" / "checkpoints" / "step-00000005"
    train(configure("second", f"train.resume={path}"))
    last = "checkpoints/step-00000012"
    assert same(tmp_path / "first" / last, tmp_path / "second" / last)
    assert lines(tmp_path / "second", "ledger")[0]["step"] == 6
    train(configure("first", "train.resume=never"))
    assert lines(tmp_path / "first", "ledger")[0]["step"] == 1
    assert steps_of(tmp_path / "first" / "previous-1") == [5, 10, 12]
    assert same(tmp_path / "first" / "previous-1" / last, tmp_path / "first" / last)


def test_incompatible_configuration_names_the_keys(configure):
    train(configure("run"))
    with pytest.raises(
        ValueError,
        match=r"another configuration: model.d_model: 32 then, 64 now; seed: 0 then, 1 now\. Set",
    ):
        train(configure("run", "model.d_model=64", "seed=1"))
    with pytest.raises(ValueError, match=r"train.resume: got 'nowhere', which is no folder"):
        train(configure("run", "train.resume=nowhere"))


def test_another_corpus_is_refused(configure, tmp_path):
    config = configure("run")
    train(config)
    file = tmp_path / "run" / "checkpoints" / "step-00000012" / "trainer.json"
    trainer = json.loads(file.read_text())
    trainer["data_fingerprint"] = "0" * 64
    with pytest.raises(ValueError, match=r"was trained on the corpus 000000000000, got \w{12} now"):
        resume.check_corpus(
            file.parent,
            trainer,
            TokenLoader.open(
                Path(config["data"]["root"]) / "text", "train", seq_len=32, seed=0
            ).fingerprint,
        )


def test_named_backend_that_cannot_run_here(configure, tmp_path):
    message = r"attention backend=varlen: needs bfloat16 or float16 on CUDA.*mixer.backend=auto"
    with pytest.raises(ValueError, match=message):
        train(configure("run", "mixer.backend=varlen", "train.compile=model"))
    assert not (tmp_path / "run").exists()


def test_unwritable_run_folder(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"run_dir: cannot write to .*/file/run \(Not a directory\)"
    ):
        train(configure("file/run"))


def test_full_disk_keeps_the_checkpoint_before(configure, tmp_path, monkeypatch):
    """The device fills up in the second checkpoint: told, tried again with the next one, which is
    the last and ends the run; it continues with more space."""
    run_dir, full = tmp_path / "run", {"left": 12}
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        full["left"] -= 1
        if full["left"] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        RunFailed,
        match=r"checkpoint of step 12: could not be written .*No space left on device.*"
        r"untouched \(the last one is .*step-00000005\); free space",
    ):
        train(configure("run"))
    monkeypatch.undo()
    events = [line for line in lines(run_dir, "ledger") if "event" in line]
    assert [(line["event"], line["step"]) for line in events][:1] == [("save_failed", 10)]
    assert "No space left on device" in events[0]["reason"]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-00000005",
    ]
    checkpoint.verify(run_dir / "checkpoints" / "step-00000005")
    assert train(configure("run"))["finished"]
    train(configure("straight"))
    last = "checkpoints/step-00000012"
    assert same(run_dir / last, tmp_path / "straight" / last)


def test_too_many_skipped_steps_end_the_run(configure, tmp_path):
    with pytest.raises(RunFailed, match=r"the last 3 steps \(up to step \d+\) were skipped"):
        train(configure("run", "optimizer.lr=1e30", "guard.max_skipped=3", "train.grad_clip=null"))
    ledger = lines(tmp_path / "run", "ledger")
    assert [line["applied"] for line in ledger[-3:]] == [False] * 3
    assert ledger[-1]["reason"] in ("loss not finite", "gradient not finite")
    assert None in (ledger[-1]["loss"], ledger[-1]["grad_norm"])  # NaN is no JSON


def test_dry_run_touches_nothing(configure, tmp_path, capsys):
    assert train(configure("run", "dry_run=true")) == {
        "dry_run": True,
        "steps": STEPS,
        "tokens": STEPS * 256,
    }
    assert "optimizer groups" in capsys.readouterr().out
    assert not list((tmp_path / "run").iterdir())


def test_same_losses_however_the_step_is_computed(configure, tmp_path):
    """Micro-batches, recomputation and unmasked rows of one document change nothing but noise."""
    variants = {
        "plain": (),
        "one": ("train.micro_batch=1",),
        "chosen": ("train.micro_batch=null",),
        "recomputed": ("train.activation_checkpointing=full",),
        "chunked": ("objective.chunk_tokens=17",),
    }
    losses = {}
    for name, options in variants.items():
        train(configure(name, *options))
        losses[name] = [line["loss"] for line in lines(tmp_path / name, "ledger")]
    for name in variants:
        assert losses[name] == pytest.approx(losses["plain"], rel=2e-5), name


def test_bf16_follows_fp32(configure, tmp_path):
    train(configure("fp32"))
    train(configure("bf16", "train.precision=bf16", "train.mask_documents=false"))
    losses = [[line["loss"] for line in lines(tmp_path / n, "ledger")] for n in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_compiled_follows_eager(configure, tmp_path, what):
    train(configure("eager"))
    train(configure("compiled", f"train.compile={what}"))
    losses = [
        [line["loss"] for line in lines(tmp_path / name, "ledger")]
        for name in ("eager", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_two_ranks(workers, corpus, small, configure, tmp_path):
    """Signal to one rank, resume, a full disk on one rank, and the losses of one rank."""
    common = ("train.total_tokens=10240", "train.keep=9")
    workers("loop_worker.py", 2, tmp_path, *corpus, *small, *common)
    train(configure("alone", *common))
    last = "checkpoints/step-00000040"
    alone = lines(tmp_path / "alone", "ledger")
    for stage in ("zero1", "zero3"):
        straight, broken = (tmp_path / f"{kind}-{stage}" for kind in ("straight", "broken"))
        assert 3 <= lines(broken, "starts")[1]["resumed_step"] < 40
        assert lines(straight, "ledger") == lines(broken, "ledger")
        assert same(straight / last, broken / last)
        for ours, one in zip(lines(straight, "ledger"), alone, strict=True):
            assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
            assert ours["tokens"] == one["tokens"]
        val, expected = (
            [line["bits_per_byte"] for line in lines(run_dir, "metrics") if line["kind"] == "val"]
            for run_dir in (straight, tmp_path / "alone")
        )
        assert val == pytest.approx(expected, rel=1e-5)
    said = [(tmp_path / f"failed-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "the last 2 saves failed" in said[0]
    assert "checkpoint of step 10: could not be written" in said[0]
    assert "rank 1: [Errno 28] No space left on device" in said[0]
    assert not list((tmp_path / "failed" / "checkpoints").iterdir())
