"""What each command does with its composed configuration: calls into the package that does it.

Heavy imports stand in the functions, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Sequence
from pathlib import Path

from llmtrain.exits import FINISHED, STOPPED

# Commands that several ranks (torchrun, srun) work on together.
SPREAD = ("train", "eval")


def run(
    command: str,
    overrides: Sequence[str],
    config_dirs: Sequence[str | Path],
    config_file: str | None = None,
) -> int:
    """Compose, check and carry out one command; returns the exit code (exits.py).

    config_file: a resolved configuration, which needs no composing.
    """
    from llmtrain.config import compose, reload
    from llmtrain.distributed import discover
    from llmtrain.shared_config import shared

    world = discover(os.environ)
    if world.size > 1 and command not in SPREAD:
        raise ValueError(
            f"llmtrain {command}: got {world.size} ranks, expected one process; start it without "
            "torchrun or srun"
        )
    if config_file and (overrides or command == "launch"):
        raise ValueError(
            f"--config: {config_file} is complete, got {' '.join([command, *overrides])!r}, "
            "expected a command without overrides (and not launch, which makes such files); change "
            "the file, or give all overrides without --config"
        )
    if command == "launch":  # its overrides are in part those of other commands
        from llmtrain.slurm.launch import launch

        launch(overrides, config_dirs)
        return FINISHED

    if command == "checkpoint":
        from llmtrain.checkpoint_command import split_action

        overrides = split_action(overrides)
    if command == "bench":
        from llmtrain.bench.command import split_action

        overrides = split_action(overrides)

    def configuration() -> dict:
        if config_file:
            return reload(command, config_file)
        return compose(command, overrides, config_dirs=config_dirs)

    with shared(world, configuration) as config:
        return COMMANDS[command](config) or FINISHED


def prep(config: dict) -> None:
    from llmtrain.prep import run_prep

    run_prep(config)


def train(config: dict) -> int:
    from llmtrain.prep import check_tokenizer
    from llmtrain.train.loop import train

    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code leaves the stack of every thread
    check_tokenizer(config)
    return FINISHED if train(config).get("finished", True) else STOPPED


def evaluate(config: dict) -> None:
    from llmtrain_eval.run import run_eval

    run_eval(config)


def generate(config: dict) -> None:
    from llmtrain.continuation import continuations

    for prompt, text in continuations(config):
        print(f"{'-' * 60}\n{prompt}|{text}")


def plan(config: dict) -> None:
    from llmtrain.plan import describe, make_plan, tokens_per_second
    from llmtrain.train.branch import settle

    config = settle(config)
    result = make_plan(config, ranks=config["plan"]["ranks"])
    print(describe(result, tokens_per_second(result, config["plan"])))


def preflight(config: dict) -> int:
    from llmtrain.slurm.preflight import run_preflight

    return run_preflight(config)


def status(config: dict) -> None:
    from llmtrain.slurm.status import show_status

    show_status(config)


def logs(config: dict) -> None:
    from llmtrain.slurm.logs import show_logs

    show_logs(config)


def checkpoint(config: dict) -> int:
    from llmtrain.checkpoint_command import run

    return run(config)


def bench(config: dict) -> int:
    from llmtrain.bench.command import run

    return run(config)


COMMANDS = {
    "prep": prep,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "plan": plan,
    "preflight": preflight,
    "status": status,
    "logs": logs,
    "checkpoint": checkpoint,
    "bench": bench,
}
