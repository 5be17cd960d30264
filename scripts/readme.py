"""Writes the parts of README.md that follow from the files: groups, mixers, channels, stacks, tree;
and the measured times in kernels/README.md, from each device's newest results/*/kernels.json.

    python scripts/readme.py           write them
    python scripts/readme.py --check   exit 1 when one is not up to date (tests/test_docs.py)

Each part stands between <!-- name --> and <!-- /name -->. The equations in the tables are written
by hand and kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
from pathlib import Path

import torch

from llmtrain import build, groups
from llmtrain.config import compose
from llmtrain.model.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
README, KERNELS = ROOT / "README.md", ROOT / "kernels" / "README.md"
SHOWN_MODEL, SHOWN_TOKENS = "gpt_124m", 8192
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


def equations(written: str) -> dict[str, str]:
    """Option -> the equation that stands in a table of README.md."""
    return dict(re.findall(r"(?m)^\| `(\w+)` \| (.*?) \| [\d,]+ \|", written))


def row(name: str, known: dict[str, str], *numbers: float) -> str:
    cells = " | ".join(f"{round(number):,}" for number in numbers)
    return f"| `{name}` | {known.get(name, WITHOUT_EQUATION)} | {cells} |"


def shown_model(group: str, name: str) -> LanguageModel:
    config = compose("train", [f"model={SHOWN_MODEL}", f"{group}={name}"])
    return build.build_model(config, vocab_size=256, device="meta")


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def mixers_table(written: str) -> list[str]:
    """Every mixer: equation (kept), parameters of a layer, state and FLOPs at SHOWN_TOKENS."""
    known, lines = equations(written), [*head("mixer", "parameters", "state, bytes")]
    for name in groups.options()["mixer"]:
        mixer = shown_model("mixer", name).stack.blocks[0].mixer
        state, flops = mixer.state_bytes(SHOWN_TOKENS), mixer.flops_per_token(SHOWN_TOKENS)
        lines.append(row(name, known, numel(mixer), state, flops))
    return lines


def channels_table(written: str) -> list[str]:
    """Every channel: equation (kept), parameters of a layer, those that a token uses, FLOPs."""
    known, lines = equations(written), [*head("channel", "parameters", "active")]
    for name in groups.options()["channel"]:
        channel = shown_model("channel", name).stack.blocks[0].channel
        total = numel(channel)
        used = total - channel.idle_parameters()
        lines.append(row(name, known, total, used, channel.flops_per_token()))
    return lines


def stacks_table(written: str) -> list[str]:
    """Every stack over attention: equation (kept), its parameters, state and FLOPs."""
    known, lines = equations(written), [*head("stack", "parameters", "state, bytes")]
    for name in groups.options()["stack"]:
        stack = shown_model("stack", name).stack
        state, flops = stack.state_bytes(SHOWN_TOKENS), stack.flops_per_token(SHOWN_TOKENS)
        lines.append(row(name, known, numel(stack), state, flops))
    return lines


def head(option: str, *columns: str) -> tuple[str, str]:
    names = [option, "equation", *columns, "FLOPs a token"]
    return f"| {' | '.join(names)} |", "|---|---|---:|---:|---:|"


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
    tables = (mixers_table, channels_table, stacks_table)
    for make in (groups_table, *tables, tree):
        name = make.__name__.removesuffix("_table")
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        written, _, after = rest.partition(end)
        lines = make(written) if make in tables else make()
        text = before + start + "\n" + "\n".join(lines) + "\n\n" + end + after
    return text


def measured(folder: Path) -> list[str]:
    """A line a kernel and shape of a benchmark's results (llmtrain_kernels/bench/harness.py)."""
    machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    rows = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    copied, multiplied = machine["bytes_per_second"], machine["flops_per_second"]
    lines = [
        f"One {machine['device']}, torch {machine['torch']}: a copy moves {copied / 1e12:.2f} "
        f"TB/s, a bfloat16 product does {multiplied / 1e12:.0f} TFLOP/s; "
        f"[{folder.name}](../results/{folder.name}).",
        "",
        "| kernel | shape | forward, ms | of floor | with backward, ms | of floor | "
        "best peer | extra MiB | error, best peer's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, peers = row["ours"], [p for p in row["peers"].values() if "error" not in p]
        if "error" in ours:
            raise ValueError(f"{folder}: got an error of {row['kernel']}, expected times")
        cells = [row["kernel"], row["shape"]]
        for key in ("fwd_ms", "fwdbwd_ms"):
            cells += [f"{ours[key]:.3f}", f"{row['floor'][key] / ours[key]:.0%}"]
        best = [min((p[key] for p in peers), default=None) for key in ("fwd_ms", "fwdbwd_ms")]
        cells.append(" / ".join("-" if ms is None else f"{ms:.3f}" for ms in best))
        cells.append(f"{ours['extra_mib']:.0f}" if "extra_mib" in ours else "")
        least = min((p["rel_err"] for p in peers), default=None)
        errors = [ours["rel_err"], *([] if least is None else [least])]
        cells.append(", ".join(f"{error:.1e}" for error in errors))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def newest_results() -> list[Path]:
    """The newest folder with times of kernels of each device, the newest of all first."""
    found = {}
    for file in sorted(ROOT.glob("results/*/kernels.json")):
        device = json.loads((file.parent / "machine.json").read_text(encoding="utf-8"))["device"]
        found[device] = file.parent
    return sorted(found.values(), reverse=True)


def renewed_kernels(text: str) -> str:
    """kernels/README.md's text with its measured times written anew."""
    tables = [measured(folder) for folder in newest_results()]
    lines = [line for table in tables for line in (*table, "")][:-1] or ["Not measured yet."]
    before, _, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->")
    return before + "<!-- measured -->\n\n" + "\n".join(lines) + "\n\n" + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, renew in ((README, renewed), (KERNELS, renewed_kernels)):
        text = file.read_text(encoding="utf-8")
        new = renew(text)
        if check and new != text:
            return 1
        file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
