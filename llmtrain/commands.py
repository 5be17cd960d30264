"""What each command does with its composed configuration: calls into the package that does it.

Heavy imports stand in the functions, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Commands that several ranks (torchrun, srun) work on together.
SPREAD = ("train", "eval")


def run(command: str, overrides: Sequence[str], config_dirs: Sequence[str | Path]) -> int:
    """Compose, check and carry out one command; returns the exit code."""
    from llmtrain.config import compose
    from llmtrain.distributed import discover
    from llmtrain.shared_config import shared

    world = discover(os.environ)
    if world.size > 1 and command not in SPREAD:
        raise ValueError(
            f"llmtrain {command}: got {world.size} ranks, expected one process; start it without "
            "torchrun or srun"
        )
    if command == "checkpoint":
        from llmtrain.checkpoint_command import split_action

        overrides = split_action(overrides)
    with shared(world, lambda: compose(command, overrides, config_dirs=config_dirs)) as config:
        return COMMANDS[command](config) or 0


def prep(config: dict) -> None:
    from llmtrain.prep import run_prep

    run_prep(config)


def train(config: dict) -> None:
    from llmtrain.prep import check_tokenizer
    from llmtrain.train.loop import train

    check_tokenizer(config)
    train(config)


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


def checkpoint(config: dict) -> int:
    from llmtrain.checkpoint_command import run

    return run(config)


COMMANDS = {
    "prep": prep,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "plan": plan,
    "checkpoint": checkpoint,
}
