"""The larger parts of a run, each made from its checked setup."""

from __future__ import annotations

from datetime import timedelta

import torch
from llmtrain_data.manifest import TOKEN_BYTES_FILE, TOKENIZER_FILE

from llmtrain import accounting, distributed
from llmtrain.data.prefetch import Prefetcher
from llmtrain.data.skips import DataSteps
from llmtrain.model.init import keyed_seed
from llmtrain.train import resume
from llmtrain.train.account import Work, attention_flops
from llmtrain.train.batches import HeldOut
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.engine import Engine
from llmtrain.train.meter import Meter
from llmtrain.train.module import TrainModule
from llmtrain.train.profiling import Profile
from llmtrain.train.saving import Saver
from llmtrain.train.setup import Setup
from llmtrain.train.stragglers import Stragglers, own_work_ends
from llmtrain.train.watchdog import Watchdog

# Ranks wait that long for the slowest one's file.
SAVE_TIMEOUT = timedelta(hours=2)


def module(setup: Setup) -> TrainModule:
    """The model as it is before the first step, on the host; seeds the random generators."""
    torch.manual_seed(keyed_seed(setup.config["seed"], f"rank {setup.world.rank}"))
    return setup.build_module()


def engine(setup: Setup, watchdog: Watchdog) -> Engine:
    """The model and its optimizer on this rank, before the first step."""
    knobs = setup.config["train"]
    built = module(setup)
    optimizer = setup.optimizer.build(built)
    check = setup.optimizer_check(built)
    if knobs["compile"] == "blocks":
        built.compile_blocks()
    elif knobs["compile"] == "model":
        built.compile_model()
    return Engine(
        built,
        optimizer,
        zero=setup.zero,
        world=setup.world,
        device=setup.device,
        micro_batch=setup.micro_batch,
        step_tokens=setup.plan.rows * setup.plan.seq_len,
        grad_clip=knobs["grad_clip"],
        check=check,
        watch=watchdog.watch,
        compute_dtype=built.model.compute_dtype,
        graphs=setup.graphs(),
    )


def meter(setup: Setup) -> Meter:
    return Meter(
        step_tokens=setup.plan.rows * setup.plan.seq_len,
        flops=setup.flops(),
        device=setup.device,
        devices=setup.world.size,
    )


def saver(setup: Setup, of: Engine, watchdog: Watchdog) -> Saver:
    """The writer of this run's checkpoints, with its host memory."""
    knobs = setup.config["train"]
    background = knobs["async_save"]
    writer = CheckpointWriter(
        setup.run_dir,
        setup.world,
        config=setup.config,
        keep=knobs["keep"],
        keep_every=knobs["keep_every"],
        vocab_size=setup.loader.vocab_size,
        parameters=of.shapes,
        corpus_files={name: setup.corpus / name for name in (TOKENIZER_FILE, TOKEN_BYTES_FILE)},
        group=distributed.side_group(setup.world, SAVE_TIMEOUT) if background else None,
    )
    made = Saver(
        writer,
        background=background,
        failures=knobs["save_failures"],
        alive=lambda: watchdog.watch.at("save"),
    )
    made.reserve(of.fragments(), resume.generators(setup.device))
    return made


def batches(setup: Setup, data: DataSteps, step: int) -> Prefetcher:
    """This rank's micro-batches of the steps after this one."""
    return Prefetcher(
        setup.loader,
        start_step=step,
        stop_step=setup.plan.steps,
        global_rows=setup.plan.rows,
        rank=setup.world.rank,
        world=setup.world.size,
        micro_rows=setup.micro_batch,
        mask_documents=setup.config["train"]["mask_documents"],
        data=data,
        device=setup.device,
    )


def held_out(setup: Setup) -> HeldOut | None:
    """The rows of validations; None when the corpus has no held-out text."""
    if setup.held_out is None:
        return None
    return HeldOut(
        setup.held_out,
        tokens=setup.config["train"]["val_tokens"],
        seq_len=setup.plan.seq_len,
        micro_rows=setup.micro_batch,
        world=setup.world,
        mask_documents=setup.config["train"]["mask_documents"],
        device=setup.device,
    )


def stragglers(setup: Setup, watchdog: Watchdog) -> Stragglers:
    made = Stragglers(
        setup.world,
        watchdog.ranks,
        setup.device,
        factor=setup.config["health"]["straggler_factor"],
        ends=own_work_ends(setup.zero),
    )
    watchdog.watch.lap = made.clock.lap
    return made


def profile(setup: Setup) -> Profile | None:
    """What profiles steps on rank 0, if it is wished for."""
    knobs = setup.config["train"]
    if not knobs["profile"] or setup.world.rank:
        return None
    model = setup.build_module("meta").model
    flops, short = (
        accounting.train_flops_per_token(model, length) for length in (setup.plan.seq_len, 1)
    )
    tokens = setup.plan.rows * setup.plan.seq_len // setup.world.size  # of this rank
    owners = setup.world.size if setup.zero.stage else 1
    work = Work(
        flops=tokens * flops,
        attention_flops=tokens * attention_flops(flops, short),
        params=sum(p.numel() for p in model.parameters()) // owners,
        tokens=tokens,
        device=setup.facts()["device"],
    )
    return Profile(
        setup.run_dir,
        setup.device,
        first=knobs["profile_first"],
        steps=knobs["profile_steps"],
        work=work,
    )
