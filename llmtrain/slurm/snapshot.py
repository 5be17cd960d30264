"""The code of a submission: a copy of the packages, so that later edits do not reach its jobs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

from llmtrain import groups
from llmtrain.slurm import template
from llmtrain.train.runlog import SNAPSHOT_FACTS, git_state

PACKAGES = ("llmtrain", "llmtrain_kernels", "llmtrain_data", "llmtrain_eval")


def take(into: Path) -> dict:
    """Copy the packages, configs and templates into a new folder, and note where they are from in
    code.json (uncommitted changes in git.diff); returns what that holds."""
    for name in PACKAGES:
        copy(package_folder(name), into / name)
    if not (into / "llmtrain" / "configs").exists():
        copy(groups.config_root(), into / "llmtrain" / "configs")
        copy(template.folder(), into / "llmtrain" / "slurm" / "templates")
    commit, changes = git_state()
    if changes:
        (into / "git.diff").write_text(changes, encoding="utf-8")
    facts = {"commit": commit, "uncommitted_changes": bool(changes), "sha256": digest(into)}
    (into / SNAPSHOT_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.submodule_search_locations, name
    return Path(spec.submodule_search_locations[0])


def copy(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def digest(folder: Path) -> str:
    """A hash of the names and contents of the packages' files."""
    total = hashlib.sha256()
    for name in PACKAGES:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"{path.relative_to(folder)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
