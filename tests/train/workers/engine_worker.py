"""Run a few steps at each ZeRO stage and write what happened: engine_worker.py OUT STAGE..."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import tiny
import torch

from llmtrain.train import distributed
from llmtrain.train.engine import Engine
from llmtrain.train.zero import Zero0, Zero1, Zero2, Zero3

ROWS, STEPS, BAD_STEP, CLIP = 8, 6, 3, 0.4
STAGES = {
    "0": lambda: Zero0(communication_dtype="fp32"),
    "1": lambda: Zero1(communication_dtype="fp32", reduce_bucket_size=700, overlap_comm=False),
    "1overlap": lambda: Zero1(
        communication_dtype="fp32", reduce_bucket_size=700, overlap_comm=True
    ),
    "2": lambda: Zero2(communication_dtype="fp32", reduce_bucket_size=700, overlap_comm=False),
    "2overlap": lambda: Zero2(
        communication_dtype="fp32", reduce_bucket_size=700, overlap_comm=True
    ),
    "3": lambda: Zero3(
        communication_dtype="fp32",
        reduce_bucket_size=700,
        overlap_comm=False,
        prefetch_bucket_size=100,
        param_persistence_threshold=20,
        max_live_parameters=1000,
        max_reuse_distance=1000,
    ),
}


def main() -> None:
    out, stages = Path(sys.argv[1]), sys.argv[2:]
    world = distributed.discover(os.environ)
    for stage in stages:
        module, knobs = tiny.build()
        engine = Engine(
            module,
            knobs.build(module),
            zero=STAGES[stage](),
            world=world,
            device=torch.device("cpu"),
            micro_batch=2,
            step_tokens=ROWS * tiny.TOKENS,
            grad_clip=CLIP,
        )
        log = []
        for step in range(STEPS):
            micros = tiny.micro_batches(
                step, rows=ROWS, rank=world.rank, size=world.size, micro_rows=2
            )
            if step == BAD_STEP and world.rank == world.size - 1:
                micros[0].weights_BT[0, 0] = float("inf")
            for i, micro in enumerate(micros):
                engine.accumulate(micro, last=i == len(micros) - 1)
            result = engine.update(1e-2 / (step + 1)).read()
            log.append(
                {
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "applied": result.applied,
                    "bits_per_byte": result.bits_per_byte,
                    "aux": result.aux,
                }
            )
        fragments = {
            f"{kind}|{f.name}|{f.offset}": view.clone()
            for f in engine.fragments()
            for kind, view in f.views.items()
        }
        evaluated = engine.evaluate(
            tiny.micro_batches(99, rows=ROWS, rank=world.rank, size=world.size, micro_rows=2)
        )
        torch.save(fragments, out / f"stage{stage}-rank{world.rank}.pt")
        if world.rank == 0:
            summary = {
                "log": log,
                "steps": engine.optimizer_steps(),
                "evaluated": evaluated,
            }
            (out / f"stage{stage}.json").write_text(json.dumps(summary))
        engine.close()
    distributed.shutdown()


if __name__ == "__main__":
    main()
