"""Why float8's loss curve lies above bf16's: short runs of the curves, changed in one thing each.

    python variants.py CORPORA OUT [VARIANT ...] [--steps 60] [--at-once 5] [--set OVERRIDE ...]

    bf16          no float8
    eager         the same without torch.compile: what another order of rounding makes
    fp8           as train.precision=fp8
    fast_sums     its forward products are summed in the tensor cores' own registers, as they were
                  in the curves of 2026-11-24
    e4m3          gradients are rounded to e4m3 instead of e5m2
    rowwise       train.precision=fp8_rowwise
    emulated      the same rounded factors multiplied in TF32, which holds their products exactly
    exact_x, exact_w, exact_dy    emulated, but for activations, weights or gradients, that stay

CORPORA holds books/, made by `llmtrain prep data=books tokenizer.vocab_size=32768`. Runs share the
GPU, --at-once of them, and are killed after --steps steps; each leaves OUT/VARIANT.jsonl, for
`python scripts/plot_runs.py`. Held-out text is not evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

RUN = (
    "data=books tokenizer.vocab_size=32768 model=llama3_8b model.vocab_size=null model.n_layers=2 "
    "model.max_seq_len=2048 train.seq_len=2048 train.micro_batch=4 train.global_batch_tokens=32768 "
    "train.total_tokens=8192000 optimizer.lr=3e-4 schedule.warmup_fraction=0.1 train.log_every=2 "
    "train.val_every=1000000 train.save_every=1000000 train.async_save=false tracker=none"
)
PRECISIONS = {"bf16": "bf16", "eager": "bf16", "rowwise": "fp8_rowwise"}
COMPILED = ("bf16", "fp8", "fast_sums", "rowwise")
EXACT = ("exact_x", "exact_w", "exact_dy")
VARIANTS = ("bf16", "eager", "fp8", "fast_sums", "e4m3", "rowwise", "emulated", *EXACT)


def change(variant: str) -> None:
    """Alter float8's functions in this process."""
    from llmtrain_kernels.float8 import E4M3, E5M2, Quantised, QuantisedWeight, op

    from llmtrain.train import copies, setup

    def exact(x: torch.Tensor) -> Quantised:
        return Quantised(x, torch.ones((), device=x.device))

    if variant == "fast_sums":
        product = torch._scaled_mm

        def fast(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
            forward = a.dtype == b.dtype  # gradients are e5m2, all else is e4m3
            return product(a, b, **{**options, "use_fast_accum": forward})

        torch._scaled_mm = fast
    if variant == "e4m3":
        op.E5M2 = E4M3
    if variant == "emulated" or variant in EXACT:
        torch.backends.cuda.matmul.allow_tf32 = True
        use_float8 = setup.use_float8
        setup.use_float8 = lambda model, scaling: use_float8(model, scaling, backend="emulated")
    if variant in ("exact_x", "exact_dy"):
        both: Callable = op.both_layouts
        left = E4M3 if variant == "exact_x" else E5M2

        def partly(x_MK: torch.Tensor, dtype: torch.dtype, scaling: str, **options: object):
            if dtype == left:
                return exact(x_MK), exact(x_MK.t().contiguous())
            return both(x_MK, dtype, scaling, **options)

        op.both_layouts = partly
    if variant == "exact_w":

        def whole(weight_FD: torch.Tensor, scaling: str, out: QuantisedWeight | None = None):
            if out is None:
                return QuantisedWeight(
                    *(exact(w.to(torch.bfloat16)) for w in (weight_FD, weight_FD.t().contiguous()))
                )
            out.forward.values.copy_(weight_FD)
            out.backward.values.copy_(weight_FD.t())
            return out

        copies.quantise_weight = whole


def train(variant: str, overrides: list[str]) -> int:
    """One run, in this process."""
    from llmtrain.cli import main

    change(variant)
    knobs = [
        f"train.precision={PRECISIONS.get(variant, 'fp8')}",
        f"train.compile={'blocks' if variant in COMPILED else 'none'}",
    ]
    return main(["train", *RUN.split(), *knobs, *overrides])


class Run:
    """A variant in a process of its own."""

    def __init__(self, variant: str, folder: Path, overrides: list[str]):
        self.variant, self.metrics = variant, folder / variant / "metrics.jsonl"
        self.log = folder / f"{variant}.log"
        command = [sys.executable, __file__, "--one", variant, *overrides]
        command += [f"run_dir={folder / variant}"]
        caches = {
            name: str(folder / f"{variant}-{name}")
            for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **caches},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def steps(self) -> int:
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        return max((json.loads(x)["step"] for x in lines if '"train"' in x), default=0)

    def ended(self, steps: int) -> bool:
        """Whether it is through, and killed then, or fell over."""
        if self.process.poll() is None and self.steps() < steps:
            return False
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return True


def run_all(options: argparse.Namespace) -> int:
    waiting, running, failed = list(options.variants or VARIANTS), [], []
    options.out.mkdir(parents=True, exist_ok=True)
    overrides = [f"data.root={options.corpora.resolve()}", *options.overrides]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="variants-") as folder:
        while waiting or running:
            if waiting and len(running) < options.at_once:
                running.append(Run(waiting.pop(0), Path(folder), overrides))
            time.sleep(0.5)
            for run in [run for run in running if run.ended(options.steps)]:
                running.remove(run)
                reached = run.steps()
                print(
                    f"{time.monotonic() - began:6.1f} s {run.variant}: {reached} steps", flush=True
                )
                if run.metrics.exists():
                    shutil.copy(run.metrics, options.out / f"{run.variant}.jsonl")
                if reached < options.steps:
                    failed.append(run.variant)
                    print(run.log.read_text(encoding="utf-8", errors="replace")[-1500:])
                shutil.rmtree(run.metrics.parent, ignore_errors=True)
    return 1 if failed else 0


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        return train(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--at-once", type=int, default=5)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="OVERRIDE")
    options = parser.parse_args()
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"variants: got {sorted(unknown)}, expected some of {', '.join(VARIANTS)}")
    return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
