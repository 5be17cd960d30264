"""Do the mixers learn what their papers say? All arms at equal parameters on equal tokens.

    python scripts/mixers_learn.py recall state --out results/mixers    # synthetic tasks
    llmtrain prep data=books data.name=books_8k tokenizer.vocab_size=8192
    python scripts/mixers_learn.py books --out results/mixers           # `llmtrain train`, 30M each
    python scripts/mixers_learn.py report --out results/mixers          # tables, figure, JSON

Every (part, arm) is a process of its own, --jobs at once on one device; its rows are appended to
<out>/results.jsonl as they come, and a second start makes only those that are missing. A process
that fails is tried once more without CUDA graphs and torch.compile; the others go on. Arms:
scripts/mixers_learn/arms.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mixers_learn import books, jobs, report, workers
from mixers_learn.arms import ARMS
from mixers_learn.jobs import Job

PARTS = ("recall", "state", "books", "report")


def size(text: str) -> tuple[int, int]:
    """ "256:64" -> (256 tokens, 64 pairs)."""
    tokens, pairs = text.split(":")
    return int(tokens), int(pairs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=PARTS)
    add("--out", type=Path, required=True, help="folder of rows, logs, runs, tables, figure")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=6, help="processes at once")
    add("--seconds", type=float, help="longest training of the learning rates of one task")
    add("--deadline", type=float, help="seconds after which everything is stopped")
    add("--safe", action="store_true", help="no CUDA graphs, no torch.compile")
    add("--worker", nargs=2, metavar=("PART", "ARM"), help=argparse.SUPPRESS)

    both = parser.add_argument_group("synthetic parts")
    add = both.add_argument
    add("--rates", nargs="+", type=float, default=[3e-3, 1e-2], help="learning rates")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=2)
    add("--recall-steps", type=int, default=6000)
    add("--recall-widths", nargs="+", type=int, default=[64])
    # Attention learns to look one token back in short rows; without them it may never begin to.
    trained = [(16, 2), (32, 4), (64, 8), (64, 16), (128, 32)]
    untrained = [(256, 64)]
    add("--recall-sizes", nargs="+", type=size, default=trained, help="tokens:pairs")
    add("--recall-tested", nargs="+", type=size, default=untrained, help="sizes not trained on")
    add("--recall-vocab", type=int, default=256)
    add("--recall-step-tokens", type=int, default=8192)
    add("--test-questions", type=int, default=8192, help="of each size of recall")
    add("--groups", nargs="+", default=["parity", "s3", "s5_swaps"])
    add("--state-steps", type=int, default=2000)
    add("--state-widths", nargs="+", type=int, default=[128])
    add("--state-tokens", type=int, default=64, help="a row of the training")
    add("--state-lengths", nargs="+", type=int, default=[64, 128, 256, 512])
    add("--state-step-tokens", type=int, default=8192)
    add("--test-rows", type=int, default=256, help="of state tracking")

    text = parser.add_argument_group("books")
    add = text.add_argument
    add("--data", default="books", help="option of the data group")
    add("--data-override", nargs="*", default=["data.name=books_8k", "tokenizer.vocab_size=8192"])
    add("--book-vocab", type=int, default=8192, help="tokens of its tokenizer")
    add("--book-tokens", type=int, default=20_000_000)
    add("--book-step-tokens", type=int, default=32_768)
    add("--micro-batch", type=int, default=64, help="rows")
    add("--book-seq-len", type=int, default=512)
    add("--book-width", type=int, default=512)
    add("--book-layers", type=int, default=8)
    add("--book-heads", type=int, default=8)
    add("--book-multiple", type=int, default=8, help="of the channel part's width")
    add("--book-rates", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates")
    add("--val-tokens", type=int, default=400_000)
    return parser.parse_args(arguments)


def work(options: argparse.Namespace) -> None:
    """A worker process."""
    part, arm = options.worker
    if part == "books":
        books.books(options, arm)
    else:
        workers.synthetic(options, part, arm)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker is not None:
        work(options)
        return 0
    typed = sys.argv[1:] if arguments is None else arguments
    wanted = [(part, arm) for part in PARTS[:-1] if part in options.parts for arm in options.arms]
    wanted.sort(key=lambda pair: not ARMS[pair[1]].sequential)  # the longest first
    todo = []
    for part, arm in wanted:
        command = [sys.executable, __file__, *typed, "--worker", part, arm]
        retry = None if options.safe else [*command, "--safe"]
        todo.append(Job(f"{part}-{arm}", command, retry))
    failed = jobs.run(
        todo, at_once=options.jobs, logs=options.out / "logs", deadline=options.deadline
    )
    if "report" in options.parts:
        report.write(options.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
