"""Why float8's loss curve lies above bf16's: the run of the curves, changed in one thing.

    python variants.py VARIANT run_dir=... data.root=... [more overrides]       (one H100, 70 s)

    bf16          no float8
    fp8           as train.precision=fp8
    fast_sums     its forward products are summed in the tensor cores' own registers, as they were
                  in the curves
    emulated      the same rounded factors multiplied in TF32, which holds their products exactly
    rowwise       train.precision=fp8_rowwise

Then `python scripts/plot_runs.py */metrics.jsonl`. Overrides come after those of the run, so that
train.compile=blocks or train.seed=1 give a second run of a variant.
"""

from __future__ import annotations

import functools
import sys

import torch

from llmtrain.cli import main
from llmtrain.train import setup

RUN = (
    "data=books tokenizer.vocab_size=32768 model=llama3_8b model.vocab_size=null model.n_layers=2 "
    "model.max_seq_len=2048 train.seq_len=2048 train.micro_batch=4 train.global_batch_tokens=32768 "
    "train.total_tokens=8192000 optimizer.lr=3e-4 schedule.warmup_fraction=0.1"
)
PRECISIONS = {"bf16": "bf16", "rowwise": "fp8_rowwise"}
VARIANTS = ("bf16", "fp8", "fast_sums", "emulated", "rowwise")


def change(variant: str) -> None:
    if variant == "fast_sums":
        product = torch._scaled_mm

        def fast(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
            forward = a.dtype == b.dtype  # gradients are e5m2, all else is e4m3
            return product(a, b, **{**options, "use_fast_accum": forward})

        torch._scaled_mm = fast
    elif variant == "emulated":
        torch.backends.cuda.matmul.allow_tf32 = True
        setup.use_float8 = functools.partial(setup.use_float8, backend="emulated")


if __name__ == "__main__":
    variant, *overrides = sys.argv[1:]
    if variant not in VARIANTS:
        sys.exit(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")
    change(variant)
    precision = f"train.precision={PRECISIONS.get(variant, 'fp8')}"
    sys.exit(main(["train", *RUN.split(), precision, *overrides]))
