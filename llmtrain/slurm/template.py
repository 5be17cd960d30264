"""The readable sbatch files of slurm/, and filling in their placeholders."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PLACEHOLDER = re.compile(r"\{(\w+)\}")


def folder() -> Path:
    """The folder of the templates: inside an installed package, or the checkout's."""
    package = Path(__file__).resolve().parent
    installed = package / "templates"
    return installed if installed.is_dir() else package.parents[1] / "slurm"


def render(name: str, values: dict[str, str | list[str]]) -> str:
    """A template with its placeholders filled in.

    A text is a word of a shell line, quoted where needed; a list makes a line of each item in place
    of its own line (options: with #SBATCH before each), none when it is empty.
    """
    template = (folder() / name).read_text(encoding="utf-8")
    used = set(PLACEHOLDER.findall(template))
    assert used == values.keys(), used ^ values.keys()
    lines = []
    for line in template.splitlines():
        alone = PLACEHOLDER.fullmatch(line)
        if alone and isinstance(values[alone.group(1)], list):
            before = "#SBATCH " if alone.group(1) == "options" else ""
            lines += [before + item for item in values[alone.group(1)]]
        else:
            lines.append(PLACEHOLDER.sub(lambda found: word(values[found.group(1)]), line))
    return "\n".join(lines) + "\n"


def word(value: str | list[str]) -> str:
    """For a shell: one quoted word, or several."""
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)
