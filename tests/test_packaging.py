"""What pyproject.toml, the Makefile and the pins say agrees with the tree."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOPS = {
    "llmtrain": ROOT,
    "llmtrain_kernels": ROOT / "kernels",
    "llmtrain_data": ROOT / "data_prep",
    "llmtrain_eval": ROOT / "eval",
}


def test_every_package_is_installed():
    found = {"llmtrain.configs", "llmtrain.slurm.templates"}
    for name, root in TOPS.items():
        for file in (root / name).rglob("__init__.py"):
            found.add(".".join(file.parent.relative_to(root).parts))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_of_modules_is_a_package():
    for name, root in TOPS.items():
        for file in (root / name).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


def test_every_data_file_is_installed():
    """YAML files lie at most one folder below configs/ and in the tasks folder of evaluation, files
    for sbatch in slurm/."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for name, patterns in data.items():
        folder = ROOT / PROJECT["tool"]["setuptools"]["package-dir"][name]
        installed = {file for pattern in patterns for file in folder.glob(pattern)}
        assert installed >= {*folder.rglob("*.yaml"), *folder.rglob("*.sbatch")}, name


def test_what_we_name_is_pinned():
    pins = {
        match.group(1).lower().replace("_", "-")
        for match in re.finditer(
            r"(?m)^([\w.-]+)==", (ROOT / "requirements" / "constraints.txt").read_text()
        )
    }
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *extras["dev"], *extras["tensorboard"], *extras["wandb"]]
    for requirement in direct:
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        assert name in pins, requirement


def test_make_targets_exist():
    targets = ["install", "quickstart", "quickstart-fresh", "test", "test-slow", "lint", "bench"]
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_install_says_what_is_missing():
    done = subprocess.run(
        [ROOT / "scripts" / "install.sh", "no/such/venv"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/no/such/python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "install: got PYTHON=/no/such/python, expected Python 3.11 or newer; name another\n"
    )


def test_ci_runs_what_the_readme_promises():
    text = (ROOT / ".ci" / "run").read_text()
    for target in ("lint", "arrows", "test"):
        assert f"make {target}\n" in text
