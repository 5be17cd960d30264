"""`llmtrain train` under srun alone: ranks from Slurm's variables, signals, requeue by Slurm."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = """#!/bin/bash
#SBATCH --partition=low --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append
export MASTER_ADDR=127.0.0.1  # no name server knows the nodes n1, n2, n3
exec srun --kill-on-bad-exit=1 llmtrain train {overrides}
"""


def test_two_nodes_are_preempted_and_continue(slurm, prepared, tiny, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*prepared, *tiny, f"run_dir={run_dir}", "train.save_every=10000"]
    job = slurm.submit(script=SCRIPT.format(overrides=" ".join(overrides)))
    slurm.at_step(run_dir, 20)
    slurm.preempt()
    slurm.wait_for(job, restarts=1, timeout=120)

    first, second = slurm.starts(run_dir)
    assert first["ranks"] == second["ranks"] == 2
    assert second["resumed_step"] >= 20  # saved on TERM: nothing was due yet
    steps = slurm.steps(run_dir)
    assert steps == list(range(1, len(steps) + 1))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"]
    assert summary["step"] == steps[-1]
    assert f"stopped on request at step {second['resumed_step']}" in slurm.output(job)
