"""What the engine costs: a step of ours under DeepSpeed against a plain PyTorch loop.

Both train the same model with the same micro-batches, fused AdamW and clipping; the plain loop has
no process group and reads nothing back. Turns alternate; the cost is the median of their ratios.
--profile also prints the GPU's busy time a step, by kernel.

    python scripts/engine_cost.py [--stage zero1] [--micro-steps 2] [key=value ...]

Further arguments are overrides of `llmtrain train` (model=gpt_124m train.compile=model ...).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch

from llmtrain import accounting, build, distributed
from llmtrain.config import compose
from llmtrain.data.batch import Batch, MicroBatch
from llmtrain.train.engine import Engine
from llmtrain.train.module import TrainModule
from llmtrain.train.optimizer import AdamW

VOCAB = 32768


def random_rows(rows: int, tokens: int, device: torch.device, seed: int) -> MicroBatch:
    """Random tokens in documents of 400 tokens on average."""
    draw = torch.Generator().manual_seed(seed)
    stream_BT = torch.randint(0, VOCAB, (rows, tokens + 1), generator=draw)
    batch = Batch(
        tokens_BT=stream_BT[:, :-1].contiguous(),
        targets_BT=stream_BT[:, 1:].contiguous(),
        weights_BT=torch.ones(rows, tokens),
        doc_starts_BT=torch.rand(rows, tokens, generator=draw) < 1 / 400,
    )
    return MicroBatch.of(batch, mask_documents=True).to(device)


def make_module(config: dict) -> tuple[TrainModule, AdamW, dict]:
    knobs = config["train"]
    dtype = build.DTYPES[knobs["precision"]]
    model = build.build_model(config, vocab_size=VOCAB, compute_dtype=dtype)
    module = TrainModule(model, build.build_objective(config), torch.ones(VOCAB))
    if knobs["compile"] == "model":
        module.compile_model()
    elif knobs["compile"] == "blocks":
        module.compile_blocks()
    spec = build.part(config["optimizer"], "optimizer")
    return module, spec, knobs


def plain_step(config: dict, device: torch.device, tokens: int) -> Callable[[list], None]:
    module, spec, knobs = make_module(config)
    module.to(device)
    optimizer = spec.build(module)

    def step(micros: list[MicroBatch]) -> None:
        for micro in micros:
            loss_sum, _, _ = module(micro)
            (loss_sum / tokens).backward()
        if knobs["grad_clip"] is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), knobs["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(
    config: dict, device: torch.device, tokens: int, rows: int, world: distributed.World
) -> Callable[[list], None]:
    module, spec, knobs = make_module(config)
    engine = Engine(
        module,
        spec.build(module),
        zero=build.part(config["deepspeed"], "deepspeed"),
        world=world,
        device=device,
        micro_batch=rows,
        step_tokens=tokens,
        grad_clip=knobs["grad_clip"],
        compute_dtype=module.model.compute_dtype,
    )
    results = []

    def step(micros: list[MicroBatch]) -> None:
        for i, micro in enumerate(micros):
            engine.accumulate(micro, last=i == len(micros) - 1)
        results.append(engine.update(1.0))
        if len(results) > 1:
            results.pop(0).read()  # as the training loop does: one step behind

    return step


def timed(step: Callable[[list], None], micros: list[MicroBatch], device: torch.device) -> float:
    began = time.perf_counter()
    step(micros)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def run_of(step: Callable[[list], None], micros: list, count: int, device: torch.device) -> float:
    """Seconds a step when `count` of them follow each other without a pause."""
    began = time.perf_counter()
    for _ in range(count):
        step(micros)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def busy(step: Callable[[list], None], micros: list, count: int = 3) -> str:
    """GPU milliseconds a step by kernel, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            step(micros)
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    lines = [
        f"{total / count / 1000:8.2f} ms in all, {sum(e.count for e in kernels) // count} kernels"
    ]
    for event in kernels[:16]:
        share = event.self_device_time_total / count / 1000
        lines.append(f"{share:8.3f} ms {event.count // count:5} x {event.key[:90]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="zero1")
    parser.add_argument("--rows", type=int, default=32, help="rows of a micro-batch")
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = compose("train", [*options.overrides, f"deepspeed={options.stage}"])
    world = distributed.discover(os.environ)
    device = distributed.choose_device(config["train"]["device"], world)
    distributed.start(world, device)
    seq_len = config["train"]["seq_len"]
    micros = [
        random_rows(options.rows, seq_len, device, seed) for seed in range(options.micro_steps)
    ]
    tokens = options.rows * seq_len * options.micro_steps
    steps = {
        "plain": plain_step(config, device, tokens),
        options.stage: engine_step(config, device, tokens, options.rows, world),
    }
    for name, step in steps.items():
        warm_up = [timed(step, micros, device) for _ in range(3)]
        print(f"{name}: first step {warm_up[0]:.1f} s", flush=True)
    gc.collect()
    gc.freeze()  # as the training loop does
    seconds = {name: [] for name in steps}
    for _ in range(options.turns):
        for name, step in steps.items():
            seconds[name].append(run_of(step, micros, options.steps, device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    meta = build.build_model(config, vocab_size=VOCAB, device="meta")
    flops = accounting.train_flops_per_token(meta, seq_len)
    for name, median in medians.items():
        rate = tokens / median
        spread = max(seconds[name]) / min(seconds[name]) - 1
        line = f"{name:6} {1000 * median:8.2f} ms/step  {rate:10,.0f} tok/s  spread {spread:.1%}"
        if device.type == "cuda":
            mfu = accounting.mfu(rate, flops, torch.cuda.get_device_name(device))
            line += f"  mfu {mfu:.1%}" if mfu is not None else ""
        print(line)
    ratios = [ours / plain - 1 for plain, ours in zip(*seconds.values())]
    low, high = min(ratios), max(ratios)
    cost = statistics.median(ratios)
    print(f"{options.stage} against plain: {cost:+.2%} ({low:+.2%} .. {high:+.2%})", flush=True)
    if options.profile:
        for name, step in steps.items():
            print(f"--- {name}\n{busy(step, micros)}", flush=True)


if __name__ == "__main__":
    main()
