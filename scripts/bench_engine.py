"""What DeepSpeed costs: our engine's step against a bare PyTorch loop, same model, same batches.

The bare loop is what a careful user writes: torch.compile, fused AdamW, clip_grad_norm_, nothing
else. Both train in one process, in alternating rounds, and the loss after every round must agree.

    python scripts/bench_engine.py --out engine.json model=gpt_124m deepspeed=zero1 \
        train.precision=bf16 train.compile=model train.seq_len=1024 train.micro_batch=32
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.train import distributed
from llmtrain.train.batches import steady
from llmtrain.train.engine import Engine
from llmtrain.train.module import MicroBatch, TrainModule

LEARNING_RATE = 1e-4


def make_module(config: dict, vocab_size: int, device: torch.device) -> TrainModule:
    dtype = build.DTYPES[config["train"]["precision"]]
    model = build.build_model(config, vocab_size=vocab_size, compute_dtype=dtype)
    module = TrainModule(model, build.build_objective(config), torch.ones(vocab_size)).to(device)
    if config["train"]["compile"] == "model":
        module.compile_model()
    elif config["train"]["compile"] == "blocks":
        module.compile_blocks()
    return module


def random_batches(
    count: int, rows: int, tokens: int, vocab_size: int, device: torch.device
) -> list[MicroBatch]:
    """Rows of random tokens, cut into documents of 300 tokens on average."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids_BT = torch.randint(1, vocab_size, (rows, tokens + 1), generator=generator)
        starts_BT = torch.rand((rows, tokens), generator=generator) < 1 / 300
        ctx = steady(SequenceContext.packed(starts_BT), tokens)
        batches.append(
            MicroBatch(
                tokens_BT=ids_BT[:, :-1].to(device),
                targets_BT=ids_BT[:, 1:].to(device),
                weights_BT=torch.ones((rows, tokens), device=device),
                ctx=ctx.to(device),
            )
        )
    return batches


def bare_step(module: TrainModule, optimizer: torch.optim.AdamW, clip: float) -> Callable:
    parameters = list(module.parameters())

    def step(micro: MicroBatch) -> None:
        loss_sum, _, _ = module(micro)
        (loss_sum / micro.tokens_BT.numel()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(engine: Engine) -> Callable:
    def step(micro: MicroBatch) -> None:
        engine.accumulate(micro, last=True)
        engine.update(LEARNING_RATE)

    return step


def timed(step: Callable, batches: list[MicroBatch], device: torch.device) -> float:
    """Milliseconds per step over all batches; the device's queue is empty before and after."""
    synchronize(device)
    start = time.perf_counter()
    for micro in batches:
        step(micro)
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / len(batches)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--steps", type=int, default=20, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    config = compose("train", [*overrides, "train.micro_batch=4"] if not any(
        item.startswith("train.micro_batch=") for item in overrides
    ) else overrides)
    world = distributed.discover(os.environ)
    device = distributed.choose_device(config["train"]["device"], world)
    rows, tokens = config["train"]["micro_batch"], config["train"]["seq_len"]
    vocab_size = config["model"]["vocab_size"] or config["tokenizer"]["vocab_size"]
    batches = random_batches(arguments.steps, rows, tokens, vocab_size, device)
    spec = build.part(config["optimizer"], build.label(config, "optimizer"))

    distributed.start(world, device)
    bare = make_module(config, vocab_size, device)
    optimizer = spec.build(bare)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    ours = make_module(config, vocab_size, device)
    engine = Engine(
        ours,
        spec.build(ours),
        zero=build.part(config["deepspeed"], build.label(config, "deepspeed")),
        world=world,
        device=device,
        micro_batch=rows,
        step_tokens=rows * tokens,
        grad_clip=config["train"]["grad_clip"],
    )
    steps = {"bare": bare_step(bare, optimizer, config["train"]["grad_clip"])}
    steps["engine"] = engine_step(engine)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds + 1):  # the first round compiles
        for name, step in steps.items():
            times[name].append(timed(step, batches, device))
    with torch.no_grad():
        losses = {
            name: float(module(batches[0])[0]) / (rows * tokens)
            for name, module in (("bare", bare), ("engine", ours))
        }
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": config["choices"]["model"],
        "parameters": sum(parameter.numel() for parameter in ours.model.parameters()),
        "deepspeed": config["choices"]["deepspeed"],
        "rows": rows,
        "seq_len": tokens,
        "step_ms": median,
        "all_ms": times,
        "ratio": median["engine"] / median["bare"],
        "tokens_per_s": {name: rows * tokens / value * 1e3 for name, value in median.items()},
        "loss_after": losses,
    }
    engine.close()
    distributed.shutdown()
    if abs(losses["engine"] - losses["bare"]) > 0.02 * abs(losses["bare"]):
        raise SystemExit(f"the two loops trained to different losses: {losses}")
    print(json.dumps({key: value for key, value in result.items() if key != "all_ms"}, indent=1))
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
