"""What each command does with its composed configuration: calls into the package that does it.

Heavy imports stand in the functions, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(command: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> None:
    """Compose, check and carry out one command."""
    from llmtrain.config import compose

    config = compose(command, overrides, config_dirs=config_dirs)
    COMMANDS[command](config)


def prep(config: dict) -> None:
    from llmtrain.prep import run_prep

    run_prep(config)


def train(config: dict) -> None:
    from llmtrain.train import loop

    if config["dry_run"]:
        plan({**config, "plan": {"ranks": 1, "tokens_per_second": None, "device_name": None}})
        return
    loop.train(config)


def evaluate(config: dict) -> None:
    from llmtrain_eval.run import run_eval

    run_eval(config)


def generate(config: dict) -> None:
    from llmtrain.continuation import continuations

    for prompt, text in continuations(config):
        print(f"{'-' * 60}\n{prompt}|{text}")


def plan(config: dict) -> None:
    from llmtrain.plan import describe, make_plan, tokens_per_second

    result = make_plan(config, ranks=config["plan"]["ranks"])
    print(describe(result, tokens_per_second(result, config["plan"])))


COMMANDS = {"prep": prep, "train": train, "eval": evaluate, "generate": generate, "plan": plan}
