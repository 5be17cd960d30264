"""The `llmtrain` command: prep, train, eval, generate, plan, bench. Parses, composes, calls.

A user's mistake ends in one message and exit code 2; --debug (or LLMTRAIN_DEBUG=1) shows the
traceback too. A failure inside another library keeps its traceback: that is nobody's typing.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from llmtrain import commands, groups
from llmtrain.exits import FAILURE, FINISHED, USAGE_ERROR, RunFailed

OWN_PACKAGES = ("llmtrain", "llmtrain_kernels", "llmtrain_data", "llmtrain_eval")
SUMMARIES = {
    "prep": "text -> tokenizer -> token shards",
    "train": "pretrain a model on prepared shards; also under torchrun and srun",
    "eval": "lm-eval tasks, passkey retrieval and bits per byte of a checkpoint",
    "generate": "continue prompts with a checkpoint",
    "plan": "parameters, FLOPs, memory and hours of a run, before it starts",
    "launch": "submit a training to Slurm: checked now, requeued and resumed by itself",
    "status": "a table of runs: state, step, loss, checkpoint, job, time left",
    "logs": "the logs of all ranks of a run under Slurm, merged by time",
    "preflight": "check this machine as `launch` checks its nodes",
    "checkpoint": "list, verify, consolidate: the checkpoints of a run",
    "bench": "step, data, kernels: measured, the device's floor, and peers beside it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    parser = make_parser()
    arguments = parser.parse_intermixed_args(argv)
    debug = arguments.debug or os.environ.get("LLMTRAIN_DEBUG", "") not in ("", "0")
    try:
        code = act(parser, arguments)
        sys.stdout.flush()  # here, where a reader that is gone makes no noise
        return code
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return FAILURE
    except (ValueError, OSError, ImportError) as error:
        if debug or not is_users(error):
            raise
        print(f"llmtrain: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except RunFailed as error:
        if debug:
            raise
        print(f"llmtrain: error: {error}", file=sys.stderr)
        return FAILURE


def act(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    if arguments.command is None or (arguments.help and arguments.command not in SUMMARIES):
        print(overview(parser))
        return FINISHED if arguments.help else USAGE_ERROR
    if arguments.command not in SUMMARIES:
        raise ValueError(
            f"llmtrain: no command {arguments.command!r}, expected one of "
            f"{', '.join(SUMMARIES)}.{groups.did_you_mean(arguments.command, list(SUMMARIES))}"
        )
    if arguments.help:
        print(command_help(arguments.command, arguments.config_dir))
        return FINISHED
    configure_logging()
    return commands.run(
        arguments.command, arguments.overrides, arguments.config_dir, arguments.config
    )


def reader_is_gone() -> bool:
    """Whether nobody reads our output any more (`| head`); it then goes nowhere, in silence."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are always reported
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmtrain", add_help=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def configure_logging() -> None:
    """Our own messages from INFO on, other libraries' warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def is_users(error: Exception) -> bool:
    """Whether an error was raised by our own checks, or is about a file."""
    if isinstance(error, OSError):
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(package in Path(innermost).parts for package in OWN_PACKAGES)


def overview(parser: argparse.ArgumentParser) -> str:
    lines = [
        "usage: llmtrain <command> [--config-dir DIR] [--debug] [group=option] [key=value] ...",
        "",
        "commands:",
        *(f"  {name:11}{summary}" for name, summary in SUMMARIES.items()),
        "",
        "`llmtrain <command> --help` lists its groups, options and keys.",
        "--config-dir DIR   search DIR for group options too (DIR/mixer/mine.yaml), repeatable",
        "--config FILE      a resolved configuration (config.yaml of a run) instead of overrides",
        "--debug            show the traceback of an error (also: LLMTRAIN_DEBUG=1)",
    ]
    return "\n".join(lines)


def command_help(command: str, config_dirs: Sequence[str]) -> str:
    """Groups with their options, then the command's YAML file, whose comments explain the keys."""
    defaults = groups.defaults(command)
    actions = {"checkpoint": "list|verify|consolidate", "bench": "step|data|kernels"}
    takes = actions.get(command, "[group=option]")
    lines = [f"usage: llmtrain {command} {takes} [key=value] ...", SUMMARIES[command], ""]
    if defaults:
        lines.append("groups (* is the default; knobs of an option: <group>.<knob>=value):")
        for group, names in groups.options(config_dirs).items():
            marked = [f"*{name}" if name == defaults.get(group) else name for name in names]
            lines.append(f"  {group:11}{' '.join(marked)}")
        lines += [
            "",
            "hybrids: +mixer@mixers.b=<option> mounts a second mixer, stack.pattern=ab alternates",
            "it with the first, aaab has it in every fourth layer.",
            "",
        ]
    lines.append(
        f"keys and their defaults (knobs of options: the files in {groups.config_root()}):"
    )
    lines += [f"  {line}".rstrip() for line in groups.keys_text(command)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
