"""README and docs are true: commands compose, tables and tree follow from the files, links hold."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from llmtrain.bench import command as bench
from llmtrain.checkpoint_command import check, split_action
from llmtrain.config import compose
from llmtrain.schema import COMMANDS
from llmtrain.slurm.launch import Typed

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


def commands() -> list[str]:
    """Every `llmtrain ...` command line in a code block of the documents; `<name>`: any mixer."""
    found = []
    for file in DOCS:
        for block in re.findall(r"(?ms)^```\w*\n(.*?)^```", file.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"(^|-m )llmtrain(\.cli)? ", line):
                    found.append(line.replace("<name>", "mqa"))
    return found


def readme_module():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("line", commands())
def test_commands_compose(line):
    words = shlex.split(line.partition(" #")[0])
    start = next(i for i, word in enumerate(words) if word in ("llmtrain", "llmtrain.cli"))
    command, *overrides = words[start + 1 :]
    assert command in COMMANDS
    if "--help" in overrides:
        return
    if command == "checkpoint":
        check(compose(command, split_action(overrides)))
    elif command == "bench":
        bench.check(compose(command, bench.split_action(overrides)))
    elif command == "launch":
        typed = Typed.split([word for word in overrides if word != "..."])
        assert compose(command, typed.launch)["overrides"] == typed.launch
        assert compose("train", typed.train)["overrides"] == typed.train
    else:
        assert compose(command, overrides)["overrides"] == overrides


def test_readme_shows_every_command():
    shown = {re.search(r"llmtrain(?:\.cli)? (\w+)", line).group(1) for line in commands()}
    assert shown >= set(COMMANDS)


def test_generated_parts_are_current():
    """Otherwise: .venv/bin/python scripts/readme.py"""
    readme = readme_module()
    text = readme.README.read_text(encoding="utf-8")
    assert readme.renewed(text) == text
    assert readme.WITHOUT_EQUATION not in text
    for name in ("groups", "mixers", "channels", "stacks", "tree"):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
    kernels = readme.KERNELS.read_text(encoding="utf-8")
    assert readme.renewed_kernels(kernels) == kernels


def test_measured_times_of_kernels(tmp_path):
    machine = {"device": "G", "torch": "2", "bytes_per_second": 3e12, "flops_per_second": 7e14}
    times = {"fwd_ms": 0.1, "fwdbwd_ms": 0.4, "extra_mib": 64.4, "rel_err": 2e-3}
    row = {
        "kernel": "rms_norm",
        "shape": "N2 D4",
        "ours": times,
        "peers": {"a": {**times, "fwd_ms": 0.2}, "b": {"error": "absent"}},
        "floor": {"fwd_ms": 0.09, "fwdbwd_ms": 0.3},
    }
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    (tmp_path / "kernels.json").write_text(json.dumps([row]))
    *_, line = readme_module().measured(tmp_path)
    shown = "0.100 | 90% | 0.400 | 75% | 0.200 / 0.400 | 64 | 2.0e-03, 2.0e-03"
    assert line == f"| rms_norm | N2 D4 | {shown} |"


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "".join(file.read_text(encoding="utf-8") for file in DOCS)
    for target in re.findall(r"(?:`|\n)make ([a-z-]+)", text):
        assert re.search(rf"(?m)^{target}:", makefile), target


@pytest.mark.parametrize("file", DOCS, ids=[str(file.relative_to(ROOT)) for file in DOCS])
def test_links_and_paths_exist(file):
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert (file.parent / target).exists(), target
    for path in re.findall(r"`((?:llmtrain|docs|tests|scripts|requirements)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
