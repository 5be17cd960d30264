"""`llmtrain logs` and `llmtrain status`, from folders as runs leave them."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from llmtrain import cli
from llmtrain.slurm import logs, status
from llmtrain.slurm.queue import Queued
from llmtrain.slurm.submission import append_line


def write_log(run: Path, name: str, lines: list[str]) -> Path:
    file = run / "logs" / f"{name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"2026-11-23T12:{line}\n" for line in lines))
    return file


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "runs" / "one"
    train = [f"00:{s:02d}.000Z train {s}/100 | loss 1" for s in range(0, 50, 10)]
    again = [f"10:{s:02d}.000Z train {s}/100 | loss 1" for s in range(30, 60, 10)]
    write_log(folder, "rank-00000", train + again)
    write_log(folder, "rank-00001", ["00:05.500Z a warning", "11:00.000Z the end"])
    write_log(folder, "driver", ["00:00.000Z job 7", "10:00.000Z requeued"])
    return folder


def shown(run: Path, **keys) -> list[str]:
    defaults = {"rank": None, "since": None, "step": None, "tail": None, "follow": False}
    out = io.StringIO()
    logs.show_logs({"run_dir": str(run), **defaults, **keys}, out)
    return out.getvalue().splitlines()


def test_ranks_are_merged_by_time(run):
    lines = shown(run)
    assert len(lines) == 12
    stamps = [line.split()[0] for line in lines]
    assert stamps == sorted(stamps)
    assert lines[0] == "2026-11-23T12:00:00.000Z driver job 7"
    assert lines[1] == "2026-11-23T12:00:00.000Z      0 train 0/100 | loss 1"
    assert lines[2] == "2026-11-23T12:00:05.500Z      1 a warning"


def test_one_rank(run):
    assert shown(run, rank=1) == [
        "2026-11-23T12:00:05.500Z a warning",
        "2026-11-23T12:11:00.000Z the end",
    ]
    assert len(shown(run, rank=[0, 1])) == 10


def test_the_last_lines_and_those_since(run):
    assert [line[-3:] for line in shown(run, tail=1)] == ["end"]
    assert len(shown(run, since="2026-11-23T12:10")) == 5
    assert shown(run, since="1h") == []


def test_since_a_step(run):
    """Step 40 was made twice: before the restart, which went back to 30, and after it."""
    assert shown(run, step=40)[0].startswith("2026-11-23T12:10:40")
    assert shown(run, step=10)[0].startswith("2026-11-23T12:00:10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step=99"], "no log line of rank 0 reports step 99 or later, the last is 50"),
        (["since=soon"], "since: got 'soon', expected a time ago"),
        (["rank=7"], "holds no logs of rank 7"),
        (["tail=0"], "tail: got 0, expected more than 0"),
    ],
)
def test_what_logs_cannot_show(run, capsys, arguments, message):
    assert cli.main(["logs", f"run_dir={run}", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_follow(run, monkeypatch):
    """New lines come as they are whole, and so do new ranks; Ctrl-C ends it."""
    monkeypatch.setattr(logs, "POLL", 0.01)
    out = io.StringIO()
    keys = {"rank": None, "since": None, "step": None, "tail": 1, "follow": True}
    seen: list[str] = []

    def write() -> None:
        with (run / "logs" / "rank-00001.log").open("a") as file:
            file.write("2026-11-23T12:20:00.000Z half of")
            file.flush()
            time.sleep(0.1)
            seen.append(out.getvalue())
            file.write(" a line\n")
        write_log(run, "rank-00002", ["21:00.000Z a new rank"])

    writer = threading.Thread(target=write)
    sleep, ends = time.sleep, time.monotonic() + 20

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if "a new rank" in out.getvalue() or time.monotonic() > ends:
            raise KeyboardInterrupt

    writer.start()
    monkeypatch.setattr(logs.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logs.show_logs({"run_dir": str(run), **keys}, out)
    writer.join()
    assert "half" not in seen[0]
    lines = out.getvalue().splitlines()
    assert [line[25:] for line in lines[1:]] == ["     1 half of a line", "     2 a new rank"]


# --- status

NOW = 1_800_000_000.0


def submit(run: Path, job: str | None, name: str = "20261123-120000") -> None:
    folder = run / "slurm" / name
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text("{}")
    config = {"train": {"total_tokens": 1000, "global_batch_tokens": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if job:
        (folder / "job_id").write_text(f"{job}\n")


def train(run: Path, step: int) -> None:
    append_line(run / "starts.jsonl", {"resumed_step": 0})
    values = {"loss": 2.5, "tokens_per_second": 1234.0, "step_seconds": 2.0}
    append_line(run / "metrics.jsonl", {"step": step, "kind": "train", **values})
    append_line(run / "metrics.jsonl", {"step": step, "kind": "val", "loss": 9.0})
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def decide(run: Path, action: str, job: str = "7", code: int = 0) -> None:
    line = {"job": job, "action": action, "code": code, "nodes": ["n1", "n2"]}
    append_line(run / "slurm" / "decisions.jsonl", line)


def job(state: str, name: str = "7", reason: str = "None") -> Queued:
    return Queued(job=name, state=state, nodes="n[1-2]", reason=reason, comment="")


def row(run: Path, *jobs: Queued, now: float = NOW) -> status.Row:
    return status.row_of(run, run.parent, jobs, now)


def test_states(tmp_path):
    run = tmp_path / "one"
    submit(run, None)
    assert row(run).state == "not submitted"
    (run / "slurm" / "20261123-120000" / "job_id").write_text("7\n")
    assert row(run, job("PENDING")).state == "queued"
    assert row(run, job("PENDING", reason="JobHeldUser")).state == "queued (held)"
    assert row(run).state == "ended before a start"
    train(run, 40)
    assert row(run, job("RUNNING")).state == "running"
    decide(run, "requeue")
    assert row(run, job("PENDING")).state == "requeued"
    assert row(run, job("COMPLETING")).state == "ending"
    assert row(run, job("RUNNING", "8")).state == "died"  # another run's job
    decide(run, "end", code=85)
    assert row(run).state == "stopped"
    decide(run, "end", code=1)
    assert row(run).state == "failed"
    (run / "summary.json").write_text(json.dumps({"finished": True}))
    assert row(run).state == "finished"


def test_a_run_outside_of_slurm(tmp_path):
    run = tmp_path / "one"
    train(run, 40)
    assert row(run).state == "died"
    (run / ".lock").write_text('{"pid": 5}')
    assert row(run, now=time.time()).state == "running"
    assert row(run, now=time.time() + 1000).state == "died"
    (run / ".lock").write_text("{}")
    (run / "summary.json").write_text(json.dumps({"finished": False}))
    assert row(run, now=time.time()).state == "stopped"


def test_figures(tmp_path):
    run = tmp_path / "one"
    submit(run, "7")
    train(run, 40)
    saved = (run / "checkpoints" / "step-00000040").stat().st_mtime
    append_line(run / "starts.jsonl", {"resumed_step": 40})
    cells = row(run, job("RUNNING"), now=saved + 65).cells()
    assert cells == (
        *("one", "running", "40/100", "2.5000", "1,234", "40 (1m05s ago)", "1", "7", "n[1-2]"),
        "2m00s",
    )


def test_the_table(tmp_path, monkeypatch, capsys):
    """Runs at any depth, a sweep's points among them, and nothing that is no run."""
    root = tmp_path / "runs"
    submit(root / "b", "7")
    submit(root / "sweep" / "x-1", "8_0")
    train(root / "a", 10)
    (root / "empty").mkdir()
    (root / "a" / "previous-1").mkdir()
    append_line(root / "a" / "previous-1" / "starts.jsonl", {})
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["status", f"root={root}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a", "b", "sweep/x-1"]
    assert cli.main(["status", f"run_dir={root / 'a'}"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("a ")
    assert cli.main(["status", "root=no/such"]) == 2
    assert "root: no/such is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (5, "5s"), (125, "2m05s"), (3600, "1h00m"), (90061, "1d01h")],
)
def test_lengths(seconds, text):
    assert status.length(seconds) == text
