"""The command line: help from the YAML files, exit codes, and one message without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import cli, commands, groups


def test_overview(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in cli.SUMMARIES:
        assert f"  {command}" in out


@pytest.mark.parametrize("command", cli.SUMMARIES)
def test_command_help_lists_groups_and_keys(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    defaults = groups.defaults(command)
    for group, options in groups.options().items():
        line = next((line for line in out.splitlines() if line.startswith(f"  {group} ")), None)
        assert (line is not None) == bool(defaults)
        if line:
            assert line.split()[1:] == [f"*{o}" if o == defaults[group] else o for o in options]
    assert ("total_tokens: 10000000 # budget" in out) == bool(defaults)
    assert ("max_new_tokens: 128" in out) == (command == "generate")


def test_help_lists_the_users_options(tmp_path, capsys):
    (tmp_path / "mixer").mkdir()
    (tmp_path / "mixer" / "mine.yaml").write_text("_target_: llmtrain.mixers.mine.Mine\n")
    assert cli.main(["train", "--help", "--config-dir", str(tmp_path)]) == 0
    assert " mine " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian', expected one of prep, train, eval, generate, plan"),
        (["plan", "mixer=atention"], "mixer=atention: no such option"),
        (["plan", "--config-dir", "no/such"], "--config-dir: no/such is not a folder"),
        (["generate", "checkpoint=no/such"], "checkpoint no/such: got no manifest.json"),
        (["train", "data.root=no/such"], "expected a directory made by `llmtrain prep`"),
    ],
)
def test_a_users_mistake(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("llmtrain: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("LLMTRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="no such option"):
        cli.main(["plan", "mixer=atention"] + ["--debug"] * (how == "flag"))


def test_a_failure_of_another_library_keeps_its_traceback(monkeypatch):
    def fail(*arguments):
        import json

        json.loads("{")  # a ValueError that none of our checks raised

    monkeypatch.setattr(commands, "run", fail)
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["plan"])


def test_a_file_that_is_missing_is_the_users(monkeypatch, capsys):
    def fail(*arguments):
        Path("no/such/file").read_text()

    monkeypatch.setattr(commands, "run", fail)
    assert cli.main(["plan"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_as_a_module():
    """`python -m llmtrain.cli`, as the launchers call it, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.cli", "plan", "norm=x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("llmtrain: error: norm=x: no such option, expected one of")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("train", "--help"), ("--help",)])
def test_reader_that_leaves_early(arguments):
    """`llmtrain ... | head`: more than a pipe's buffer, and less."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llmtrain.cli", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_broken_pipe_inside_is_not_silent(monkeypatch, capfd):
    def fail(*_):
        raise BrokenPipeError("a worker's pipe")

    monkeypatch.setattr(commands, "run", fail)
    with pytest.raises(BrokenPipeError, match="a worker's pipe"):
        cli.main(["plan"])
