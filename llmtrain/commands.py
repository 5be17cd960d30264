"""What each command does with its composed configuration: calls into the package that does it.

Heavy imports stand in the functions: `llmtrain --help` and a mistyped key answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(command: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> None:
    """Compose, check and carry out one command."""
    from llmtrain.config import compose

    config = compose(command, overrides, config_dirs=config_dirs)
    COMMANDS[command](config)


def plan(config: dict) -> None:
    from llmtrain.plan import describe, make_plan, tokens_per_second

    result = make_plan(config, ranks=config["plan"]["ranks"])
    print(describe(result, tokens_per_second(result, config["plan"])))


COMMANDS = {"plan": plan}
