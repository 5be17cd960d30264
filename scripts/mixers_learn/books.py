"""The books: each arm through `llmtrain train`, about 30M parameters, embedding included."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from llmtrain import build
from mixers_learn import results
from mixers_learn.arms import ARMS, Matched, match
from mixers_learn.workers import key_of, machine, model_facts


def training(options: argparse.Namespace, name: str, lr: float) -> list[str]:
    """The overrides that every arm shares, less the sizes of the model."""
    steps = -(-options.book_tokens // options.book_step_tokens)
    on_gpu = options.device.startswith("cuda")
    sequential = ARMS[name].sequential
    compiled = on_gpu and not options.safe and not sequential
    # what goes token by token takes as long for all rows of a step as for some of them
    rows = options.book_step_tokens // options.book_seq_len if sequential else options.micro_batch
    return [
        f"model.n_heads={options.book_heads}",
        f"model.n_kv_heads={options.book_heads}",
        f"model.max_seq_len={options.book_seq_len}",
        "model.init_std=0.04",
        "model.qk_norm=true",
        f"data={options.data}",
        *options.data_override,
        f"optimizer.lr={lr}",
        "schedule.warmup_fraction=0.1",
        "schedule.min_ratio=0.1",
        "tracker=none",
        f"train.seq_len={options.book_seq_len}",
        f"train.global_batch_tokens={options.book_step_tokens}",
        f"train.micro_batch={rows}",
        f"train.total_tokens={options.book_tokens}",
        f"train.precision={'bf16' if on_gpu else 'fp32'}",
        f"train.compile={'blocks' if compiled else 'none'}",
        f"train.device={'cuda' if on_gpu else 'cpu'}",
        f"train.log_every={max(1, steps // 60)}",
        f"train.val_every={max(1, steps // 6)}",
        f"train.val_tokens={options.val_tokens}",
        f"train.save_every={10 * steps}",
        "train.keep=1",
    ]


def books(options: argparse.Namespace, name: str) -> None:
    """Train an arm with every learning rate, or go on, and write the row of the best."""
    settings = {k: v for k, v in vars(options).items() if k.startswith(("book", "data"))}
    key = key_of("books", name, **settings)
    if key in results.finished(options.out):
        return
    trained = {lr: run(options, name, lr) for lr in options.book_rates}
    losses = {
        lr: read_summary(folder)["val"]["bits_per_byte"] for lr, (folder, _) in trained.items()
    }
    best = min(losses, key=losses.__getitem__)
    row = row_of(*trained[best], options, name)
    results.append(options.out, {"key": key, "lr": best, "rates": losses, **row})


def run(options: argparse.Namespace, name: str, lr: float) -> tuple[Path, Matched]:
    """One run of an arm, or its continuation: (its folder, the arm)."""
    matched = match(
        ARMS[name],
        training(options, name, lr),
        d_model=options.book_width,
        layers=options.book_layers,
        vocab_size=options.book_vocab,
        synthetic=False,
        multiple=options.book_multiple,
    )
    folder = options.out / "runs" / f"books_{name}_{lr:g}"
    command = [sys.executable, "-m", "llmtrain.cli", "train", *matched.overrides]
    command += [f"name={folder.name}", f"run_dir={folder}"]
    print("llmtrain train", *command[4:], flush=True)
    subprocess.run(command, check=True)
    return folder, matched


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def row_of(run_dir: Path, matched: Matched, options: argparse.Namespace, name: str) -> dict:
    """What a finished run's files say."""
    summary = read_summary(run_dir)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    starts = (run_dir / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    train = [entry for entry in entries if entry["kind"] == "train"]
    model = build.build_model(matched.config, vocab_size=options.book_vocab, device="meta")
    return {
        "part": "books",
        "arm": name,
        "task": "books",
        "width": options.book_width,
        "seed": 0,
        "finished": summary["finished"],
        "tokens": summary["tokens"],
        "steps": summary["step"],
        "bits_per_byte": summary["val"]["bits_per_byte"],
        "val": [[e["tokens"], e["bits_per_byte"]] for e in entries if e["kind"] == "val"],
        "curve": [[e["tokens"], e["bits_per_byte"]] for e in train],
        # the first interval has no rate, where it is one step; the last may be short
        "tokens_per_second": median(
            e["tokens_per_second"] for e in train if "tokens_per_second" in e
        ),
        "skipped": summary["skipped"],
        # a finished run that was started once more has a summary without a step
        "memory_gib": max(e.get("memory_gib", 0.0) for e in train),
        "data_stream": json.loads(starts[-1])["data_stream"],
        **model_facts(model, matched, options.book_seq_len),
        **machine(torch.device(options.device)),
    }
