"""Rates of data preparation and loading, as ratios to what they are measured against.

    python data_prep/bench/bench_data.py [--workers 2] [--repeats 3] [--out bench.json]

prepare (read, split, encode, write, sync; an existing tokenizer) against `tokenizers`' own
encode_batch on as many threads, of the same documents already in memory. First it is checked that
both give the same tokens. Then the loader on one core: rows, targets, document starts, contexts.
The documents are the standard library's, or those of --jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from llmtrain_data.documents import Source
from llmtrain_data.manifest import Manifest, open_split
from llmtrain_data.prepare import prepare
from llmtrain_data.sources import Jsonl, StandardLibrary
from llmtrain_data.tokenizer import Bpe, Existing, load_tokenizer, train_bpe
from tokenizers import Tokenizer

from llmtrain.data.batch import MicroBatch
from llmtrain.data.loader import TokenLoader

GOAL_PREPARE = 0.8  # of encode_batch
GOAL_LOADER = 5e6  # tokens per second
BATCH_BYTES = 8_000_000  # of text in one call of encode_batch
ROWS, STEPS = 64, 50


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, by encode_batch."""
    ids: list[list[int]] = []
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > BATCH_BYTES:
            ids += [e.ids for e in tokenizer.encode_batch(batch, add_special_tokens=False)]
            batch, size = [], 0
    ids += [e.ids for e in tokenizer.encode_batch(batch, add_special_tokens=False)]
    return ids


def run_prepare(source: Source, out: Path, tokenizer: Path, workers: int) -> float:
    """Seconds of one preparation from scratch."""
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(
            out_dir=out,
            sources={"text": source},
            tokenizer=Existing(path=str(tokenizer)),
            val_fraction=0.0,
            workers=workers,
            overwrite=True,
        )
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """Of this process and its ended children: what other work on the machine disturbs least."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure_prepare(source: Source, work: Path, workers: int, repeats: int) -> dict:
    texts = [document.text for document in source if document.text]
    size = sum(len(text.encode()) for text in texts)
    file = work / "tokenizer.json"
    file.write_text(train_bpe(texts[::8], Bpe(vocab_size=8192)).to_str())
    tokenizer = load_tokenizer(file)
    expected = [token for ids in encode_all(tokenizer, texts) for token in [0, *ids]]
    run_prepare(source, work / "corpus", file, workers)
    shards = open_split(work / "corpus", Manifest.load(work / "corpus"), "train")["text"]
    assert np.array_equal(np.concatenate([shard.tokens for shard in shards]), expected)
    theirs, ours, their_cpu, our_cpu = [], [], [], []
    for _ in range(repeats):  # alternating, so that a busy machine slows down both
        start, cpu = time.perf_counter(), cpu_seconds()
        encode_all(tokenizer, texts)
        theirs.append(time.perf_counter() - start)
        their_cpu.append(cpu_seconds() - cpu)
        cpu = cpu_seconds()
        ours.append(run_prepare(source, work / "corpus", file, workers))
        our_cpu.append(cpu_seconds() - cpu)
    result = {
        "documents": len(texts),
        "megabytes": size / 1e6,
        "tokens": len(expected),
        "workers": workers,
        "encode_batch_seconds": theirs,
        "prepare_seconds": ours,
        "encode_batch_cpu_seconds": their_cpu,
        "prepare_cpu_seconds": our_cpu,
        "encode_batch_tokens_per_s": len(expected) / min(theirs),
        "prepare_tokens_per_s": len(expected) / min(ours),
        "prepare_megabytes_per_s": size / 1e6 / min(ours),
        "ratio": min(theirs) / min(ours),
        "ratio_of_cpu_seconds": min(their_cpu) / min(our_cpu),
        "goal": GOAL_PREPARE,
    }
    print(
        f"prepare: {result['prepare_tokens_per_s'] / 1e6:.2f} M tokens/s end to end, encode_batch "
        f"{result['encode_batch_tokens_per_s'] / 1e6:.2f} M tokens/s, ratio {result['ratio']:.2f} "
        f"(goal {GOAL_PREPARE}; by CPU seconds {result['ratio_of_cpu_seconds']:.2f})"
    )
    return result


def measure_loader(corpus: Path, seq_len: int, repeats: int, *, mask_documents: bool) -> dict:
    loader = TokenLoader.open(corpus, "train", seq_len=seq_len, seed=0)
    rates = []
    for repeat in range(repeats):
        start = time.process_time()  # of this one thread: other work on the machine does not count
        for step in range(STEPS):
            batch = loader.batch((repeat * STEPS + step) * ROWS, ROWS)
            MicroBatch.of(batch, mask_documents=mask_documents)
        rates.append(STEPS * ROWS * seq_len / (time.process_time() - start))
    result = {
        "seq_len": seq_len,
        "mask_documents": mask_documents,
        "tokens_per_s": max(rates),
        "ratio": max(rates) / GOAL_LOADER,
        "goal": GOAL_LOADER,
    }
    print(
        f"loader, seq_len={seq_len}, mask_documents={mask_documents}: {max(rates) / 1e6:.1f} M "
        f"tokens/s on one core, {result['ratio']:.1f} x the goal of {GOAL_LOADER / 1e6:.0f} M"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jsonl", default=None, help="take documents of these jsonl files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="write the numbers as JSON")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    torch.set_num_threads(1)
    source = Jsonl(arguments.jsonl) if arguments.jsonl else StandardLibrary()
    with tempfile.TemporaryDirectory() as work:
        prepared = measure_prepare(source, Path(work), arguments.workers, arguments.repeats)
        loaded = [
            measure_loader(Path(work) / "corpus", seq_len, arguments.repeats, mask_documents=mask)
            for seq_len in (256, 1024, 4096)
            for mask in (True, False)
        ]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "prepare": prepared,
        "loader": loaded,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
