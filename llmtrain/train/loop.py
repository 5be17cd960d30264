"""Training, from a resolved configuration to a checkpoint and a summary.

    check everything -> join the ranks -> resume or start -> steps -> last checkpoint -> summary

Step s = 1 .. N takes the samples (s-1) G .. s G - 1 of the data order (G rows a step) and index
s - 1 of the schedule; both are pure functions of s, so a resumed run continues where it left.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from llmtrain_data.manifest import TOKEN_BYTES_FILE, TOKENIZER_FILE

from llmtrain import distributed
from llmtrain.data.prefetch import Prefetcher
from llmtrain.model.init import keyed_seed
from llmtrain.train import resume
from llmtrain.train.batches import HeldOut
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.engine import Engine, Pending, bits_per_byte
from llmtrain.train.guard import SkipGuard, StopRequest
from llmtrain.train.meter import Meter, peak_memory
from llmtrain.train.runlog import LOGGERS, RunLog
from llmtrain.train.saving import Saver
from llmtrain.train.setup import Setup

log = logging.getLogger(__name__)

# Ranks wait that long for the slowest one's file.
SAVE_TIMEOUT = timedelta(hours=2)


def train(config: dict) -> dict:
    """Run, or continue, the training of a composed `train` configuration; returns its summary.

    Every rank calls it. ValueError for what can be known before the first step: sizes that do not
    divide, a missing corpus, an unwritable run folder, a checkpoint of other settings.
    """
    world = distributed.discover(os.environ)
    if world.rank:
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
    device = distributed.choose_device(config["train"]["device"], world)
    setup = Setup.check(config, world, device)
    if world.rank == 0:
        print(setup.describe(), flush=True)
    if config["dry_run"]:
        return {"dry_run": True, "steps": setup.plan.steps, "tokens": setup.plan.tokens}
    if config["train"]["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(config["train"]["deterministic"])
    distributed.start(world, device)
    with StopRequest() as stop:
        run = Run(setup, stop)
        try:
            return run.train()
        finally:
            run.close()


class Run:
    """One start of a run: built fresh or from a checkpoint, then train()."""

    def __init__(self, setup: Setup, stop: StopRequest):
        self.setup, self.stop = setup, stop
        self.world, self.device = setup.world, setup.device
        self.knobs = setup.config["train"]
        self.rows = setup.plan.rows
        self.step_tokens = self.rows * setup.plan.seq_len
        start = resume.choose(self.knobs["resume"], setup.run_dir, self.world)
        trainer = {"step": 0, "skipped": 0}
        if start is not None:
            trainer = resume.read_trainer(start)
            resume.check_config(start, setup.config)
            resume.check_corpus(start, trainer, setup.loader.fingerprint)
        self.step = self.saved_step = self.first_step = trainer["step"]
        self.guard = SkipGuard(self.knobs["max_skipped"], trainer["skipped"])

        torch.manual_seed(keyed_seed(setup.config["seed"], f"rank {self.world.rank}"))
        module = setup.build_module()
        optimizer = setup.optimizer.build(module)
        if self.knobs["compile"] == "blocks":
            module.compile_blocks()
        elif self.knobs["compile"] == "model":
            module.compile_model()
        self.engine = Engine(
            module,
            optimizer,
            zero=setup.zero,
            world=self.world,
            device=self.device,
            micro_batch=setup.micro_batch,
            step_tokens=self.step_tokens,
            grad_clip=self.knobs["grad_clip"],
        )
        if start is not None:
            resume.restore(start, self.engine, trainer)
        self.run_id = resume.claim_run_id(setup.run_dir, start, trainer, self.world)
        self.saver = self.make_saver()
        self.meter = Meter(
            step_tokens=self.step_tokens,
            flops=setup.flops(),
            device=self.device,
            devices=self.world.size,
        )
        self.held_out = None
        if setup.held_out is not None:
            self.held_out = HeldOut(
                setup.held_out,
                tokens=self.knobs["val_tokens"],
                seq_len=setup.plan.seq_len,
                micro_rows=setup.micro_batch,
                world=self.world,
                mask_documents=self.knobs["mask_documents"],
                device=self.device,
            )
        self.log = RunLog(
            setup.run_dir,
            writes=self.world.rank == 0,
            total_steps=setup.plan.steps,
            tracker=setup.tracker,
        )
        self.log.start(setup.config, self.facts(start), resumed_step=self.step)
        # Steps whose results the host has not read: it stays one behind a GPU, so as not to wait.
        self.pending: deque[tuple[int, float, Pending]] = deque()
        self.behind = 1 if self.device.type == "cuda" else 0
        self.stopping = False
        self.validated: dict[str, float] = {}

    def make_saver(self) -> Saver:
        """The writer of this run's checkpoints, with its host memory."""
        corpus = self.setup.corpus
        writer = CheckpointWriter(
            self.setup.run_dir,
            self.world,
            config=self.setup.config,
            keep=self.knobs["keep"],
            keep_every=self.knobs["keep_every"],
            vocab_size=self.setup.loader.vocab_size,
            parameters=self.engine.shapes,
            corpus_files={name: corpus / name for name in (TOKENIZER_FILE, TOKEN_BYTES_FILE)},
            group=distributed.side_group(self.world, SAVE_TIMEOUT),
        )
        saver = Saver(
            writer, background=self.knobs["async_save"], failures=self.knobs["save_failures"]
        )
        saver.reserve(self.engine.fragments(), resume.generators(self.device))
        return saver

    def train(self) -> dict:
        """All steps, or those until a signal; then the last checkpoint. Returns the summary."""
        with Prefetcher(
            self.setup.loader,
            start_step=self.step,
            stop_step=self.setup.plan.steps,
            global_rows=self.rows,
            rank=self.world.rank,
            world=self.world.size,
            micro_rows=self.setup.micro_batch,
            mask_documents=self.knobs["mask_documents"],
            device=self.device,
        ) as batches:
            while self.step < self.setup.plan.steps and not self.stopping:
                self.one_step(batches)
                if self.step == self.first_step + 1:
                    gc.collect()
                    gc.freeze()  # what lives now lives to the end: later collections are short
                if self.step % self.knobs["val_every"] == 0 and not self.stopping:
                    self.validate()
                if self.step % self.knobs["save_every"] == 0:
                    self.save()
        self.read_results(behind=0)
        self.saver.settle()  # ends here, on all ranks, when saves kept failing
        if self.stopping:
            self.log.say(f"stopped on request at step {self.step}; the same command continues")
        elif self.validated.get("step") != self.step:
            self.validate()
        self.save()
        self.saver.finish()
        self.report_saves()
        return self.summarise()

    def one_step(self, batches: Prefetcher) -> None:
        """Forward and backward of this rank's micro-batches, and the update."""
        micros = next(batches)
        self.meter.waited += batches.waited_seconds
        for i, micro in enumerate(micros):
            ctx = self.engine.module.model.stack.drawn(
                micro.ctx,
                seed=self.setup.config["seed"],
                step=self.step,
                micro=i,
                rank=self.world.rank,
            )
            self.engine.accumulate(replace(micro, ctx=ctx), last=i == len(micros) - 1)
        lr = self.setup.optimizer.lr * self.setup.schedule.ratio(self.step)
        self.step += 1
        self.stop.install()
        stop = self.stop.requested is not None or self.saver.exhausted
        self.pending.append((self.step, lr, self.engine.update(lr, stop=stop)))
        self.read_results(behind=self.behind)
        self.report_saves()

    def read_results(self, *, behind: int) -> None:
        """Take note of all steps but the last `behind`."""
        while len(self.pending) > behind:
            step, lr, pending = self.pending.popleft()
            result = pending.read()
            self.stopping |= result.stop
            self.log.step(
                step,
                {
                    "applied": result.applied,
                    "reason": None if result.applied else "loss or gradient not finite",
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "tokens": result.tokens,
                    "samples": [(step - 1) * self.rows, step * self.rows],
                },
            )
            self.guard.saw(step, result.applied)
            self.meter.add(result)
            if step % self.knobs["log_every"] == 0 or step == self.setup.plan.steps:
                values = {"lr": lr, "tokens": step * self.step_tokens, **self.meter.take()}
                self.log.interval(step, "train", values | {"skipped": self.guard.skipped})

    def validate(self) -> None:
        """Loss and bits per byte over the held-out rows."""
        if self.held_out is None:
            return
        with self.paused():
            sums = self.engine.evaluate(self.held_out)
        self.validated = {
            "step": self.step,
            "loss": sums["ce"] / sums["weight"],
            "bits_per_byte": bits_per_byte(sums["ce"], sums["bytes"]),
        }
        values = {k: v for k, v in self.validated.items() if k != "step"}
        tokens = {"tokens": self.step * self.step_tokens, "val_tokens": sums["weight"]}
        self.log.interval(self.step, "val", values | tokens)

    def save(self) -> None:
        """Begin a checkpoint of this step, unless there is one."""
        if self.saved_step == self.step:
            return
        with self.paused():
            trainer = {
                "step": self.step,
                "optimizer_steps": self.engine.optimizer_steps(),
                "skipped": self.guard.skipped,
                "tokens": self.step * self.step_tokens,
                "next_sample": self.step * self.rows,
                "data_fingerprint": self.setup.loader.fingerprint,
                "data_stream": self.setup.loader.stream_hash,
                "run_id": self.run_id,
            }
            states = resume.generators(self.device)
            self.saver.save(self.step, self.engine.fragments(), states, trainer)
        self.saved_step = self.step

    def report_saves(self) -> None:
        """Note the saves that became durable, or failed, since the last call."""
        for save in self.saver.take_finished():
            if save.failure is None:
                self.log.interval(save.step, "save", save.metrics(), now=self.step)
            else:
                reason = str(save.failure)
                self.log.step(save.step, {"event": "save_failed", "reason": reason})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not the steps'."""
        self.read_results(behind=0)
        began = time.perf_counter()
        yield
        self.meter.pause(time.perf_counter() - began)

    def facts(self, start: object) -> dict:
        """What a line of starts.jsonl says about this start."""
        cuda = self.device.type == "cuda"
        return {
            "resumed_from": None if start is None else str(start),
            "ranks": self.world.size,
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "micro_batch": self.setup.micro_batch,
            "micro_steps": self.rows // self.world.size // self.setup.micro_batch,
            "data_fingerprint": self.setup.loader.fingerprint,
            "data_stream": self.setup.loader.stream_hash,
            "backends": self.setup.backends,
            "deepspeed": self.engine.config,
        }

    def summarise(self) -> dict:
        """What the run came to; rank 0 writes it to summary.json."""
        summary = {
            "finished": self.step == self.setup.plan.steps,
            "step": self.step,
            "tokens": self.step * self.step_tokens,
            "skipped": self.guard.skipped,
            "val": self.validated or None,
            "save_failures": self.saver.failed,
            "checkpoint": str(self.saver.writer.path(self.step)),
            "ranks": self.world.size,
            **self.meter.overall(),
        }
        peak = peak_memory(self.device)
        summary["memory"] = {"peak_gib": peak / 2**30}
        if self.device.type == "cuda":
            estimate = self.setup.plan.memory[self.setup.zero.stage].total
            summary["memory"] |= {"planned_gib": estimate / 2**30, "planned/peak": estimate / peak}
            self.log.say(
                f"memory: planned {estimate / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB "
                f"({estimate / peak - 1:+.0%})"
            )
        if self.world.rank == 0:
            path = self.setup.run_dir / "summary.json"
            path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return summary

    def close(self) -> None:
        gc.unfreeze()
        self.saver.close()
        self.report_saves()
        self.log.close()
        self.engine.close()
