"""What one worker process does: one arm in one part, every missing row of it."""

from __future__ import annotations

import argparse
import json
import platform
import sys

import torch

from mixers_learn import results
from mixers_learn.arms import ARMS, Matched, match
from mixers_learn.tasks import Recall, Task, WordProblem, seeded
from mixers_learn.training import Learner, curve, state_bytes, train_together

# Of every arm in the synthetic parts; sizes of heads follow the width.
COMMON = [
    "optimizer.weight_decay=0.1",
    "schedule.warmup_fraction=0.1",
    "schedule.min_ratio=0.0",
    "model.init_std=0.05",
    "model.qk_norm=true",  # attention then finds recall in half the steps
]


def sizes(options: argparse.Namespace, longest: int) -> list[str]:
    """The overrides that every synthetic arm shares."""
    heads = [f"model.n_heads={options.heads}", f"model.n_kv_heads={options.heads}"]
    return [*COMMON, *heads, f"model.max_seq_len={max(longest, 1024)}"]


def tasks(options: argparse.Namespace, part: str) -> list[Task]:
    if part == "recall":
        return [
            Recall(
                sizes=tuple(options.recall_sizes),
                tested=tuple(options.recall_tested),
                vocab_size=options.recall_vocab,
                step_tokens=options.recall_step_tokens,
                test_questions=options.test_questions,
            )
        ]
    return [
        WordProblem(
            name=name,
            tokens=options.state_tokens,
            lengths=tuple(options.state_lengths),
            step_tokens=options.state_step_tokens,
            test_rows=options.test_rows,
        )
        for name in options.groups
    ]


def longest(task: Task) -> int:
    if isinstance(task, Recall):
        return max(tokens for tokens, _ in (*task.sizes, *task.tested))
    return max(task.tokens, *task.lengths)


def key_of(part: str, arm: str, **settings: object) -> str:
    """What tells rows apart: everything that changes the result."""
    return json.dumps([part, arm, settings], sort_keys=True, default=str)


def synthetic(options: argparse.Namespace, part: str, name: str) -> None:
    """All tasks, widths and seeds of an arm; the learning rates of each train side by side."""
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high" if part == "recall" else "highest")
    steps = options.recall_steps if part == "recall" else options.state_steps
    for task in tasks(options, part):
        for width in options.recall_widths if part == "recall" else options.state_widths:
            matched = match(
                ARMS[name],
                sizes(options, longest(task)),
                d_model=width,
                layers=options.layers,
                vocab_size=task.vocab_size,
                synthetic=True,
            )
            for seed in options.seeds:
                facts = {
                    "task": repr(task),
                    "width": width,
                    "seed": seed,
                    "steps": steps,
                    "overrides": matched.overrides,
                }
                keys = {lr: key_of(part, name, lr=lr, **facts) for lr in options.rates}
                done = results.finished(options.out)
                rates = [lr for lr in options.rates if keys[lr] not in done]
                if rates:
                    several(options, part, name, task, matched, device, rates, keys, facts)


def several(
    options: argparse.Namespace,
    part: str,
    name: str,
    task: Task,
    matched: Matched,
    device: torch.device,
    rates: list[float],
    keys: dict[float, str],
    facts: dict,
) -> None:
    """Train one model for each learning rate on the same batches and write their rows."""
    graph = device.type == "cuda" and not options.safe
    seed, steps = facts["seed"], facts["steps"]
    config = {**matched.config, "seed": seed}
    learners = [
        Learner(config, vocab_size=task.vocab_size, lr=lr, steps=steps, device=device, graph=graph)
        for lr in rates
    ]
    took, seconds = train_together(learners, task, seed=seed, seconds=options.seconds)
    tests = task.tests(seeded(device, seed, f"{task.name}/test"))
    for lr, learner in zip(rates, learners, strict=True):
        correct = [learner.correct(examples) for examples in tests]
        row = {
            "key": keys[lr],
            "part": part,
            "arm": name,
            "task": task.name,
            "width": facts["width"],
            "seed": seed,
            "lr": lr,
            "finished": took == steps,
            "steps": took,
            "planned_steps": steps,
            "tokens": took * task.step_tokens,
            "accuracy": task.scores(correct),
            "chance": task.chance,
            "curve": curve(learner.losses),
            "seconds": round(seconds, 2),
            "learners_at_once": len(rates),
            "mode": "graph" if graph else "eager",
            **model_facts(learner.model, matched, longest(task)),
            **machine(device),
        }
        results.append(options.out, row)
        shown = "  ".join(f"{size} {value:.3f}" for size, value in row["accuracy"].items())
        print(f"{part} {task.name} {name} width {facts['width']} lr {lr:g}: {shown}", flush=True)


def model_facts(model: torch.nn.Module, matched: Matched, tokens: int) -> dict:
    return {
        "body_parameters": matched.body,
        "target_parameters": matched.target,
        "parameters": matched.total,
        "ffn_hidden": matched.hidden,
        "overrides": matched.overrides,
        "flops_per_token": model.flops_per_token(tokens),
        "state_bytes": state_bytes(model, tokens),
    }


def machine(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
