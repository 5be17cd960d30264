"""Steps, a checkpoint in the middle and a resume at each ZeRO stage; what happened goes to files.

    engine_worker.py OUT [FROM]     FROM: output of another call, whose checkpoints are loaded too

Under torchrun or alone. Rank files are stage<S>[-resumed|-from<T>]-rank<R>.pt: a list of
(kind, name, offset, tensor), the fragments at the end; stage<S>.json: what rank 0 saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch

from llmtrain import distributed
from llmtrain.distributed import World
from llmtrain.train import resume
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.engine import Engine
from llmtrain.train.truth import OptimizerCheck
from llmtrain.train.zero import Zero0, Zero1, Zero2, Zero3

ROWS, STEPS, SAVE_AT, BAD_STEP, CLIP = 8, 6, 3, 4, 0.4
BUCKET = {"communication_dtype": "fp32", "reduce_bucket_size": 700}
STAGE3 = {
    "prefetch_bucket_size": 100,
    "param_persistence_threshold": 20,
    "max_live_parameters": 1000,
    "max_reuse_distance": 1000,
}
STAGES = {
    "0": lambda: Zero0(communication_dtype="fp32"),
    "1": lambda: Zero1(**BUCKET, overlap_comm=False),
    "1overlap": lambda: Zero1(**BUCKET, overlap_comm=True),
    "2": lambda: Zero2(**BUCKET, overlap_comm=False),
    "2overlap": lambda: Zero2(**BUCKET, overlap_comm=True),
    "3": lambda: Zero3(**BUCKET, **STAGE3, overlap_comm=False),
    "3overlap": lambda: Zero3(**BUCKET, **STAGE3, overlap_comm=True),
}


def make(stage: str, world: World, seed: int) -> Engine:
    module, knobs = tiny.build(seed)
    check = OptimizerCheck(knobs, module, elements=10_000, world=world, device=torch.device("cpu"))
    return Engine(
        module,
        knobs.build(module),
        zero=STAGES[stage](),
        world=world,
        device=torch.device("cpu"),
        micro_batch=2,
        step_tokens=ROWS * tiny.TOKENS,
        grad_clip=CLIP,
        check=check,
    )


def run_steps(engine: Engine, steps: range) -> list[dict]:
    world, log = engine.world, []
    for step in steps:
        micros = tiny.micro_batches(step, rows=ROWS, rank=world.rank, size=world.size, micro_rows=2)
        if step == BAD_STEP and world.rank == world.size - 1:
            micros[0].weights_BT[0, 0] = float("inf")
        engine.module.model.use_sometimes = step % 2 == 0
        for i, micro in enumerate(micros):
            engine.accumulate(micro, last=i == len(micros) - 1)
        result = engine.update(1 / (step + 1), stop=step == world.rank == 0).read()
        log.append(
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "applied": result.applied,
                "stop": result.stop,
                "bits_per_byte": result.bits_per_byte,
                "aux": result.aux,
            }
        )
    return log


def dump(engine: Engine, path: Path) -> None:
    fragments = [
        (kind, fragment.name, fragment.offset, view.clone())
        for fragment in engine.fragments()
        for kind, view in fragment.views.items()
    ]
    torch.save(fragments, f"{path}-rank{engine.world.rank}.pt")


def one_stage(stage: str, world: World, out: Path) -> None:
    engine = make(stage, world, seed=0)
    log = run_steps(engine, range(SAVE_AT))
    writer = CheckpointWriter(
        out / f"run{stage}",
        world,
        config={},
        keep=2,
        vocab_size=tiny.VOCAB,
        parameters=engine.shapes,
        corpus_files={},
    )
    trainer = {"optimizer_steps": engine.optimizer_steps()}
    dump(engine, out / f"stage{stage}-saved")
    generators = resume.generators(torch.device("cpu"))
    path = writer.save(SAVE_AT, engine.fragments(), generators, trainer)
    expected_draw = torch.rand(3).tolist()
    log += run_steps(engine, range(SAVE_AT, STEPS))
    dump(engine, out / f"stage{stage}")
    summary = {"log": log, "steps": engine.optimizer_steps()}
    held_out = tiny.micro_batches(99, rows=ROWS, rank=world.rank, size=world.size, micro_rows=2)
    summary["evaluated"] = engine.evaluate(held_out)
    engine.close()

    engine = make(stage, world, seed=1)
    resume.restore(path, engine, trainer)
    summary["same_draw"] = torch.rand(3).tolist() == expected_draw
    summary["resumed"] = run_steps(engine, range(SAVE_AT, STEPS))
    dump(engine, out / f"stage{stage}-resumed")
    engine.close()
    if world.rank == 0:
        (out / f"stage{stage}.json").write_text(json.dumps(summary))


def main() -> None:
    out = Path(sys.argv[1])
    world = distributed.discover(os.environ)
    distributed.start(world, torch.device("cpu"))
    for stage in STAGES:
        one_stage(stage, world, out)
    others = [Path(other) for other in sys.argv[2:]]
    for other in [out, *others]:
        for source, stage in (("1", "3"), ("3", "2"), ("2", "0"), ("0", "1")):
            engine = make(stage, world, seed=1)
            path = next((other / f"run{source}" / "checkpoints").glob("step-*"))
            resume.restore(path, engine, {"optimizer_steps": SAVE_AT})
            dump(engine, out / f"stage{stage}-from{source}{other.name}")
            engine.close()


if __name__ == "__main__":
    main()
