"""`llmtrain bench data`: what the loader gives, beside what a training step takes.

A core prepares rows in a thread while the GPU computes; the loader is no hindrance when a core
gives several times what the step needs. The needs are those of configs/model at the share of the
device's peak that NEEDS names (of an H100 where the device's own is not known).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from llmtrain import accounting, build
from llmtrain.bench.command import write
from llmtrain.bench.corpus import write_random
from llmtrain.bench.entries import GPT, LLAMA_1B, Entry
from llmtrain.data.batch import MicroBatch
from llmtrain.data.loader import TokenLoader
from llmtrain.data.prefetch import Prefetcher

NEEDS = ((LLAMA_1B, 0.61), (GPT, 0.4))
FALLBACK = "NVIDIA H100 80GB HBM3"
VOCAB, TOKENS, SECONDS = 50_000, 20_000_000, 3.0


def bench_data(config: dict, device: torch.device, out: Path) -> int:
    """Print and write data.json."""
    quick = config["quick"]
    tokens, seconds = (200_000, 0.2) if quick else (TOKENS, SECONDS)
    shapes = [(128, 4, 16)] if quick else [(1024, 32, 64), (4096, 4, 16), (32768, 1, 2)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as folder:
        corpus = Path(folder) / "random"
        write_random(corpus, vocab_size=VOCAB, tokens=tokens)
        for seq_len, micro, rows_a_step in shapes:
            loader = TokenLoader.open(corpus, "train", seq_len=seq_len, seed=0)
            for masked in (True, False):
                row = {"T": seq_len, "micro_batch": micro, "mask_documents": masked}
                row["prepared_tokens_per_s"] = prepare(loader, micro, masked, seconds)
                row |= served(loader, micro, rows_a_step, masked, device, seconds)
                rows.append(row)
                print(line(row), flush=True)
    needs = [need(entry, share, device) for entry, share in NEEDS]
    slowest = min(row["prepared_tokens_per_s"] for row in rows)
    for found in needs:
        found["slowest_over_need"] = slowest / found["tokens_per_s"]
        print(
            f"{found['model']} at {found['mfu']:.0%} MFU of {found['device']} takes "
            f"{found['tokens_per_s']:,.0f} tokens/s: a core gives "
            f"{found['slowest_over_need']:.1f}x that"
        )
    write(out / "data.json", {"loader": rows, "needs": needs})
    return 0


def prepare(loader: TokenLoader, micro: int, masked: bool, seconds: float) -> float:
    """Tokens a second of one core that makes micro-batches and does nothing else."""
    MicroBatch.of(loader.batch(0, micro), mask_documents=masked)
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        MicroBatch.of(loader.batch(made * micro, micro), mask_documents=masked)
        made += 1
    return made * micro * loader.seq_len / (time.perf_counter() - began)


def served(
    loader: TokenLoader, micro: int, rows: int, masked: bool, device: torch.device, seconds: float
) -> dict:
    """What the trainer's thread serves to a step that takes no time, copies to the device
    included."""
    options = {"rank": 0, "world": 1, "micro_rows": micro, "mask_documents": masked}
    with Prefetcher(loader, start_step=0, global_rows=rows, device=device, **options) as steps:
        next(steps)
        began, made = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(steps)
            made += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
    return {"served_tokens_per_s": made * rows * loader.seq_len / taken}


def need(entry: Entry, share: float, device: torch.device) -> dict:
    """Tokens a second of a step at that share of the peak."""
    config = entry.config(precision="bf16", compile_mode="none")
    model = build.build_model(config, vocab_size=entry.vocab, device="meta")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else FALLBACK
    if accounting.peak_flops(name) is None:
        name = FALLBACK
    flops = accounting.train_flops_per_token(model, entry.seq_len)
    rate = share * accounting.peak_flops(name) / flops
    return {"model": entry.name, "mfu": share, "device": name, "tokens_per_s": rate}


def line(row: dict) -> str:
    masked = "documents masked" if row["mask_documents"] else "dense"
    return (
        f"T {row['T']:6} micro-batch {row['micro_batch']:3} {masked:16} "
        f"{row['prepared_tokens_per_s']:14,.0f} tokens/s a core, "
        f"{row['served_tokens_per_s']:14,.0f} through the trainer's thread"
    )
