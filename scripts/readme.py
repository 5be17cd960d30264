"""Writes the parts of README.md that follow from the files: groups, mixers, tree.

    python scripts/readme.py           write them
    python scripts/readme.py --check   exit 1 when README.md is not up to date (tests/test_docs.py)

Each part stands between <!-- name --> and <!-- /name -->. The equations in the table of mixers are
written by hand and kept.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from pathlib import Path

from llmtrain import build, groups
from llmtrain.config import compose

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MIXER_MODEL, MIXER_TOKENS = "gpt_124m", 8192
WITHOUT_EQUATION = "(write the equation here)"

# Half a line for what has no docstring or title of its own.
ABOUT = {
    ".ci/run": "what is checked on every change",
    "CHANGELOG.md": "what changed between versions",
    "CONTRIBUTING.md": "how a change is checked",
    "LICENSE": "Apache-2.0",
    "Makefile": "install, quickstart, test, lint, bench",
    "pyproject.toml": "package, dependencies, settings of the tools",
    "requirements/constraints.txt": "exact versions of everything installed",
}
FOLDERS = {
    "configs": "one folder a group, one file an option, every knob with a comment",
    "data_prep": "text to token shards; imports nothing of ours",
    "docs": "decisions, formats, log of experiments",
    "eval": "lm-eval adapter, passkey retrieval, bits per byte, counting baselines",
    "kernels": "one public function an operation, with backends and a float64 reference",
    "llmtrain": "the library and the command line",
    "results": "one folder a result: command, hardware, log",
    "scripts": "programs around the library",
    "slurm": "job templates",
    "tests": "mirror the files they test; tests/mixers/test_contract.py covers every mixer",
}
# Folders shown without their files.
CLOSED = (["tests"], ["results"], ["slurm"])
NAME_WIDTH, ABOUT_WIDTH = 34, 76


def groups_table() -> list[str]:
    """Every group with its options, the default first in bold."""
    defaults = groups.defaults("train")
    lines = ["| group | options |", "|---|---|"]
    for group, names in groups.options().items():
        ordered = sorted(names, key=lambda name: (name != defaults[group], name))
        lines.append(f"| {group} | **{ordered[0]}** {' '.join(ordered[1:])}".rstrip() + " |")
    return lines


def mixers_table(written: str) -> list[str]:
    """Every mixer: equation (kept), parameters of a layer, state and FLOPs at MIXER_TOKENS."""
    equations = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*?) \| [\d,]+ \|", written))
    lines = [
        "| mixer | equation | parameters | state, bytes | FLOPs a token |",
        "|---|---|---:|---:|---:|",
    ]
    for name in groups.options()["mixer"]:
        config = compose("train", [f"model={MIXER_MODEL}", f"mixer={name}"])
        model = build.build_model(config, vocab_size=256, device="meta")
        mixer = model.stack.blocks[0].mixer
        numbers = (
            sum(parameter.numel() for parameter in mixer.parameters()),
            mixer.state_bytes(MIXER_TOKENS),
            round(mixer.flops_per_token(MIXER_TOKENS)),
        )
        cells = " | ".join(f"{number:,}" for number in numbers)
        lines.append(f"| `{name}` | {equations.get(name, WITHOUT_EQUATION)} | {cells} |")
    return lines


def tree() -> list[str]:
    """The tracked files, each with half a line."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines: list[str] = []
    above: list[str] = []
    for name in sorted(listed, key=lambda name: (name.count("/") == 0, name)):
        *folders, file = name.split("/")
        about = describe(name)
        if about is None or folders[:1] in CLOSED:
            folders = folders[:1]
        for depth, folder in enumerate(folders):
            if tuple(folders[: depth + 1]) != above[: depth + 1]:
                lines.append(
                    entry(depth, f"{folder}/", FOLDERS.get(folder, "") if not depth else "")
                )
        above = tuple(folders)
        if about is not None and folders[:1] not in CLOSED:
            lines.append(entry(len(folders), file, about))
    return ["```", *lines, "```"]


def entry(depth: int, name: str, about: str) -> str:
    return f"{'  ' * depth + name:<{NAME_WIDTH}}  {about}".rstrip()


def describe(name: str) -> str | None:
    """Half a line about a file: by hand, its docstring, its title, or its first comment."""
    if name in ABOUT:
        return ABOUT[name]
    file = ROOT / name
    if file.suffix == ".py" and file.name != "__init__.py":
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        return shortened(docstring)
    if file.suffix == ".md" and name != "README.md":
        return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    if file.suffix == ".yaml" and file.parent == ROOT / "configs":
        return shortened(file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    return None


def shortened(text: str) -> str:
    """The first sentence, or as many of its clauses as half a line holds."""
    text = re.split(r"\.(?:\s|$)", text.split("\n\n")[0].replace("\n", " "))[0].rstrip(":;,")
    while len(text) > ABOUT_WIDTH and (cut := max(map(text.rfind, (": ", "; ", ", ", " (")))) > 0:
        text = text[:cut]
    return text


def renewed(text: str) -> str:
    """README.md's text with every generated part written anew."""
    for name, make in (("groups", groups_table), ("mixers", mixers_table), ("tree", tree)):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        written, _, after = rest.partition(end)
        lines = make(written) if make is mixers_table else make()
        text = before + start + "\n" + "\n".join(lines) + "\n\n" + end + after
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = README.read_text(encoding="utf-8")
    new = renewed(text)
    if parser.parse_args().check:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
