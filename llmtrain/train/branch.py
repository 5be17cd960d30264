"""A decay that branches off a checkpoint of a stable run: how long the run then is.

    llmtrain train name=branch train.resume=<checkpoint> schedule=wsd schedule.decay_from=resume
        schedule.decay_steps=2000

The decay begins after the checkpoint's step and the run ends with it, whatever train.total_tokens
is. Any number of branches can start from one run (Hu et al. 2024, arXiv:2404.06395).
"""

from __future__ import annotations

from pathlib import Path

from llmtrain import checkpoint

HOW = "schedule.decay_from"


def settle(config: dict) -> dict:
    """The configuration with decay_from as a number and train.total_tokens such that the run ends
    with the decay; without decay_from as it is. ValueError for what does not fit."""
    schedule, train = config["schedule"], config["train"]
    start, steps = schedule.get("decay_from"), schedule.get("decay_steps")
    if start is None:
        return config
    if steps is None:
        raise ValueError(
            f"{HOW}: got {start}, but not how long the decay is, expected schedule.decay_steps "
            "too; set it, or remove schedule.decay_from"
        )
    for override in config.get("overrides", ()):
        if override.partition("=")[0].lstrip("+") == "train.total_tokens":
            raise ValueError(
                f"{override}: has no effect with {HOW}, the run ends with the decay; remove either"
            )
    start = checkpoint_step(train["resume"]) if start == "resume" else start
    if not isinstance(start, int) or start < 0 or steps < 1:
        raise ValueError(
            f"{HOW}: got {start!r} and schedule.decay_steps={steps}, expected resume or a number "
            "of steps, and a decay of at least one; fix them"
        )
    tokens = (start + steps) * train["global_batch_tokens"]
    return {
        **config,
        "schedule": {**schedule, "decay_from": start},
        "train": {**train, "total_tokens": tokens},
    }


def checkpoint_step(resume: str) -> int:
    """The step of the checkpoint that train.resume names."""
    if resume in ("auto", "never") or not (Path(resume) / "manifest.json").is_file():
        raise ValueError(
            f"{HOW}=resume: got train.resume={resume}, expected the folder of a checkpoint "
            "(.../checkpoints/step-...), where the decay begins; set it, or give the step as "
            "schedule.decay_from=<step>"
        )
    return checkpoint.read_manifest(resume).step
