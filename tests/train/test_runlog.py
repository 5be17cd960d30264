"""Logs, console lines, trackers, guards: what is written, and what is said when it cannot be."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest

from llmtrain.train import runlog, tracker
from llmtrain.train.runlog import RunLog, append_from, check_writable, console_line
from llmtrain.train.stopping import SIGNALS, StopRequest
from llmtrain.train.tracker import All, Silent, TensorBoard, WandB


def test_append_from_keeps_the_lines_up_to_a_step(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with append_from(path, 2, 0) as file:
        file.write('{"step": 3, "again": true}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_append_from_keeps_earlier_courses_and_what_happened(tmp_path):
    """A rollback from 3 to 1, then one from 4 to 2, each beginning a course; some before courses
    had numbers."""
    path = tmp_path / "ledger.jsonl"
    lines = [
        {"step": 1},
        {"step": 3, "course": 0},
        {"event": "rollback", "step": 3, "course": 1},
        *({"step": step, "course": 1} for step in (2, 3, 4)),
        {"event": "fault", "step": 4, "course": 1},
        {"event": "rollback", "step": 4, "course": 2},
        {"step": 3, "course": 2},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    for step, course, gone in ((2, 2, [8]), (3, 1, [5, 7, 8]), (9, 0, [2, 3, 4, 5, 7, 8])):
        path.write_text(text)
        append_from(path, step, course).close()
        left = [json.loads(line) for line in path.read_text().splitlines()]
        assert left == [line for i, line in enumerate(lines) if i not in gone]


def test_console_line_leaves_out_what_is_quiet():
    values = {"loss": 3.25, "lr": 1e-3, "guard/skipped": 0, "data_wait_seconds": 1e-5, "mfu": 0.4}
    assert (
        console_line(10, 20, "train", values)
        == "train 10/20 | loss 3.2500 | lr 1.00e-03 | mfu 40.0%"
    )
    assert "skipped 2" in console_line(10, 20, "train", values | {"guard/skipped": 2})
    assert "data 0.500 s" in console_line(10, 20, "train", values | {"data_wait_seconds": 0.5})


def write_a_little(run_dir: Path, mirror: tracker.Tracker) -> None:
    run_dir.mkdir()
    log = RunLog(run_dir, writes=True, total_steps=4, tracker=mirror)
    log.start({"seed": 0}, {"ranks": 1}, resumed_step=0)
    log.step(1, {"loss": math.nan, "applied": False})
    log.interval(1, "train", {"loss": 2.0, "lr": 0.1})
    log.interval(1, "val", {"loss": 3.0})
    log.close()


def test_metrics_are_json_without_nan(tmp_path):
    write_a_little(tmp_path / "run", Silent())
    assert json.loads((tmp_path / "run" / "ledger.jsonl").read_text())["loss"] is None
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[1]) == {"step": 1, "course": 0, "kind": "val", "loss": 3.0}


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", writes=False, total_steps=4, tracker=Silent())
    log.start({}, {}, resumed_step=0)
    log.step(1, {})
    log.interval(1, "train", {})
    log.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_mirrors_metrics(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    write_a_little(tmp_path / "run", TensorBoard())
    events = accumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.0
    assert events.Scalars("val/loss")[0].value == 3.0


def test_wandb_is_offline_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not tracker.has_account()
    write_a_little(tmp_path / "run", All(project="test", entity=None))
    assert list((tmp_path / "run" / "wandb").rglob("offline-run-*"))
    assert (tmp_path / "run" / "tensorboard").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k")
    assert tracker.has_account()


def test_missing_tracker_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImportError, match=r"tracker=wandb: needs .* `pip install llmtrain\[wandb\]`"
    ):
        WandB(project="test", entity=None).start(tmp_path, config={}, resumed_step=0)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir: cannot write to .*expected a writable folder"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert not list((tmp_path / "new" / "run").iterdir())


def test_git_state_of_the_checkout_and_of_an_installed_package(monkeypatch, tmp_path):
    commit, _ = runlog.git_state()
    assert commit is None or len(commit) == 40
    monkeypatch.setattr(runlog.llmtrain, "__file__", str(tmp_path / "site" / "llmtrain" / "x.py"))
    assert runlog.git_state() == (None, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signal_sets_the_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_second_interrupt_is_immediate():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_that_a_library_replaced_are_set_again():
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGPIPE)}
    with StopRequest() as stop:
        for number in before:
            signal.signal(number, signal.SIG_DFL)  # what would end the process
        stop.install()
        os.kill(os.getpid(), signal.SIGPIPE)
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    assert {number: signal.getsignal(number) for number in before} == before
