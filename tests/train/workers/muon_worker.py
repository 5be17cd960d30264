"""Steps of Muon at ZeRO stages 0, 1 and 2, a checkpoint in the middle, and what others wrote read.

    muon_worker.py OUT [FROM...]     FROM: output of another call, whose checkpoints are loaded too

Files as those of engine_worker.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import engine_worker
import tiny
import tiny_muon
import torch

from llmtrain import distributed
from llmtrain.distributed import World
from llmtrain.train import resume
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.engine import Engine
from llmtrain.train.matrices import Matrix
from llmtrain.train.matrix_homes import Whole
from llmtrain.train.truth import OptimizerCheck, WrongUpdate

ROWS, STEPS, SAVE_AT, BAD_STEP, CLIP = 12, 5, 2, 3, 0.05
FLOAT16_STEPS = 2
STAGES = ("0", "1", "2overlap")
CROSSINGS = (("1", "0"), ("0", "2overlap"), ("2overlap", "1"))


def make(stage: str, world: World, seed: int, **changed: object) -> Engine:
    module, knobs = tiny_muon.build(seed, **changed)
    check = OptimizerCheck(knobs, module, elements=300_000, world=world, device=torch.device("cpu"))
    return Engine(
        module,
        knobs.build(module),
        zero=engine_worker.STAGES[stage](),
        world=world,
        device=torch.device("cpu"),
        micro_batch=2,
        step_tokens=ROWS * tiny.TOKENS,
        grad_clip=CLIP,
        check=check,
    )


def run_steps(engine: Engine, steps: range, out: Path | None = None) -> list[dict]:
    world, log = engine.world, []
    for step in steps:
        micros = tiny.micro_batches(step, rows=ROWS, rank=world.rank, size=world.size, micro_rows=2)
        bad = step == BAD_STEP
        if bad and world.rank == world.size - 1:
            micros[0].weights_BT[0, 0] = float("inf")
        if bad and out is not None:
            engine_worker.dump(engine, Path(f"{out}-before-bad"))
        for i, micro in enumerate(micros):
            engine.accumulate(micro, last=i == len(micros) - 1)
        result = engine.update(1 / (step + 1)).read()
        if bad and out is not None:
            engine_worker.dump(engine, Path(f"{out}-after-bad"))
        entry = {"loss": result.loss, "grad_norm": result.grad_norm, "applied": result.applied}
        log.append(entry)
    return log


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
    engine_worker.dump(engine, out / f"stage{stage}-saved")
    generators = resume.generators(torch.device("cpu"))
    path = writer.save(SAVE_AT, engine.fragments(), generators, trainer)
    log += run_steps(engine, range(SAVE_AT, STEPS), out / f"stage{stage}")
    engine_worker.dump(engine, out / f"stage{stage}")
    summary = {"log": log, "steps": engine.optimizer_steps()}
    engine.close()

    engine = make(stage, world, seed=1)
    resume.restore(path, engine, trainer)
    summary["resumed"] = run_steps(engine, range(SAVE_AT, STEPS))
    engine_worker.dump(engine, out / f"stage{stage}-resumed")
    engine.close()
    if world.rank == 0:
        (out / f"stage{stage}.json").write_text(json.dumps(summary))


def main() -> None:
    out = Path(sys.argv[1])
    world = distributed.discover(os.environ)
    distributed.start(world, torch.device("cpu"))
    for stage in STAGES:
        one_stage(stage, world, out)
    for other in map(Path, sys.argv[2:]):
        for source, stage in CROSSINGS:
            engine = make(stage, world, seed=1)
            path = next((other / f"run{source}" / "checkpoints").glob("step-*"))
            resume.restore(path, engine, {"optimizer_steps": SAVE_AT})
            engine_worker.dump(engine, out / f"stage{stage}-from{source}{other.name}")
            run_steps(engine, range(SAVE_AT, STEPS))
            engine_worker.dump(engine, out / f"stage{stage}-continued{source}{other.name}")
            engine.close()

    flat_shapes(world, out)
    in_float16(world, out)


def in_float16(world: World, out: Path) -> None:
    """As on a GPU: what ranks exchange is in bfloat16, results are in float16."""
    for stage in STAGES:
        engine = make(stage, world, seed=0, ns_dtype="fp16")
        run_steps(engine, range(FLOAT16_STEPS))
        engine_worker.dump(engine, out / f"float16-{stage}")
        engine.close()


def flat_shapes(world: World, out: Path) -> None:
    """Muon as DeepSpeed would run one that it does not know: on a flat slice as on one matrix."""
    engine = make("1", world, seed=0)
    numel = engine.optimizer.param_groups[0]["params"][0].numel()
    engine.optimizer.homes["matrices"] = Whole([[Matrix(start=0, rows=1, cols=numel)]])
    try:
        run_steps(engine, range(1))
    except WrongUpdate as error:
        (out / f"flat-rank{world.rank}.txt").write_text(str(error))
    engine.close()


if __name__ == "__main__":
    main()
