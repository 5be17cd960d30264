"""Training, from a resolved configuration to a checkpoint and a summary.

    check everything -> join the ranks -> resume or start -> steps -> last checkpoint -> summary

Step s = 1 .. N takes index s - 1 of the schedule and the samples d G .. (d+1) G - 1 of the data
order (G rows a step; d = s - 1, or further on if data was passed over); both are pure functions of
s and of the data passed over, so a resumed run continues where it left.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain import distributed
from llmtrain.data.prefetch import Prefetcher
from llmtrain.train import assembly, faults, resume, rollback
from llmtrain.train.engine import bits_per_byte
from llmtrain.train.guard import Guard
from llmtrain.train.health import Comparison
from llmtrain.train.lock import RunLock
from llmtrain.train.meter import memory_used
from llmtrain.train.results import Made, Results
from llmtrain.train.rollback import Course
from llmtrain.train.runlog import LOGGERS, RunLog
from llmtrain.train.schedule import announce_resume
from llmtrain.train.setup import Setup
from llmtrain.train.startup import Startup
from llmtrain.train.stopping import StopRequest
from llmtrain.train.watchdog import Watch, Watchdog, collective_timeout

log = logging.getLogger(__name__)


def train(config: dict) -> dict:
    """Run, or continue, the training of a composed `train` configuration; returns its summary.

    Every rank calls it. ValueError for what can be known before the first step: sizes that do not
    divide, a missing corpus, an unwritable run folder, a checkpoint of other settings.
    """
    startup = Startup()
    startup.lap("imports and configuration")
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
    distributed.start(world, device, collective_timeout(config["health"]))
    startup.lap("checks and data")
    limits = {key: config["health"][key] for key in ("hang_seconds", "first_step_seconds")}
    with (
        RunLock(setup.run_dir, world),
        StopRequest() as stop,
        Watchdog(Watch(), world, setup.run_dir, **limits) as watchdog,
    ):
        run = Run(setup, stop, watchdog, startup)
        try:
            return run.train()
        finally:
            run.close()


class Run:
    """One start of a run: built fresh or from a checkpoint, then train()."""

    def __init__(self, setup: Setup, stop: StopRequest, watchdog: Watchdog, startup: Startup):
        self.setup, self.stop, self.watch = setup, stop, watchdog.watch
        self.world, self.device = setup.world, setup.device
        self.knobs = setup.config["train"]
        self.rows = setup.plan.rows
        self.step_tokens = self.rows * setup.plan.seq_len
        candidates = resume.Candidates.of(self.knobs["resume"], setup.run_dir, self.world)
        self.start, trainer = candidates.first(), {}
        if self.start is not None:
            self.check_start(self.start)  # before the engine takes its time
        self.faults = faults.Faults(setup.faults, rank=self.world.rank, run_dir=setup.run_dir)
        self.guard = Guard(setup.guard)
        self.meter = assembly.meter(setup)
        self.engine = assembly.engine(setup, watchdog)
        startup.lap("model and engine")
        self.startup: Startup | None = startup
        self.generators = resume.generators(self.device)  # as they are before the first step
        self.step = 0
        if self.start is not None:
            self.start = candidates.load(self.load_start)
            trainer = resume.read_trainer(self.start)
            resume.settle_on(self.start, setup.run_dir, self.world)
        self.saved_step = self.first_step = self.step
        self.course = self.known_course(trainer)
        self.run_id = resume.claim_run_id(setup.run_dir, self.start, trainer, self.world)
        self.saver = assembly.saver(setup, self.engine, watchdog)
        if self.start is not None:
            self.saver.writer.retention.written(self.start)  # just read, and good
        self.saver.writer.retention.suspect = self.guard.suspect
        self.saver.writer.delete_old(self.step)  # of which a kill may have kept the last start
        self.comparison = Comparison(
            self.engine.module,
            self.world,
            watchdog.ranks,
            config=setup.config,
            corpus=setup.loader.fingerprint,
        )
        self.held_out = assembly.held_out(setup)
        self.validated: dict[str, float] = {}
        self.validation_due = trainer.get("validation_due", False)
        self.log = self.open_log()
        if self.start is not None:
            announce_resume(setup.schedule, setup.optimizer.lr, trainer)
        self.stragglers = assembly.stragglers(setup, watchdog)
        self.profile = assembly.profile(setup)
        self.results = Results(
            self.guard,
            self.meter,
            self.log,
            self.stragglers,
            behind=1 if self.device.type == "cuda" else 0,
            log_every=self.knobs["log_every"],
            last_step=setup.plan.steps,
        )
        startup.lap("checkpoint and logs")

    def check_start(self, path: Path) -> None:
        """ValueError unless a checkpoint is of this training."""
        resume.check_config(path, self.setup.config)
        fingerprint = self.setup.loader.fingerprint
        resume.check_corpus(path, resume.read_trainer(path), fingerprint)

    def load_start(self, path: Path) -> None:
        self.check_start(path)
        self.load(path)

    def load(self, path: Path) -> None:
        """Everything as after the step of a checkpoint, whatever was done before. BadCheckpoint
        for a damaged one; then another is to be loaded."""
        trainer = resume.read_trainer(path)
        resume.set_generators(self.generators, self.device)
        resume.restore(path, self.engine, trainer)
        self.step = trainer["step"]
        self.guard.load(trainer.get("guard"))
        self.meter.clear()
        if "interval" in trainer:
            self.meter.restore(trainer["interval"])

    def start_over(self) -> None:
        """Everything as before the first step."""
        resume.reset(self.engine, assembly.module(self.setup))
        resume.set_generators(self.generators, self.device)
        self.step = 0
        self.guard.load(None)
        self.meter.clear()

    def known_course(self, trainer: dict) -> Course:
        """The course to continue: the checkpoint's, and what the ledger adds to it."""
        course = Course.of(trainer)
        if self.world.rank == 0:
            stream = self.setup.loader.stream_hash
            course = course.known_to(self.setup.run_dir, self.step, stream=stream, rows=self.rows)
        return distributed.broadcast_object(course, self.world)

    def open_log(self) -> RunLog:
        """The logs of the run folder, cut where this start continues."""
        run_log = RunLog(
            self.setup.run_dir,
            writes=self.world.rank == 0,
            total_steps=self.setup.plan.steps,
            tracker=self.setup.tracker,
        )
        facts = {
            "resumed_from": None if self.start is None else str(self.start),
            **self.setup.facts(),
            "deepspeed": self.engine.config,
        }
        run_log.start(self.setup.config, facts, resumed_step=self.step, course=self.course.number)
        return run_log

    def train(self) -> dict:
        """All steps, or those until a signal; then the last checkpoint. Returns the summary."""
        if self.validation_due:
            self.validate()
        while self.guard.stretch or (self.step < self.setup.plan.steps and not self.stopping):
            if self.guard.stretch:
                self.roll_back()
            with assembly.batches(self.setup, self.course.data, self.step) as batches:
                self.steps(batches)
            self.results.read()
        self.watch.at("save")
        self.saver.at_end()  # ends here, on all ranks, when saves kept failing
        if self.stopping:
            self.log.say(f"stopped on request at step {self.step}; the same command continues")
        elif self.validated.get("step") != self.step:
            self.validate()
        self.save()
        self.saver.finish()
        self.report_saves()
        return self.summarise()

    @property
    def stopping(self) -> bool:
        """Whether some rank was asked to stop, as a step's result told all of them."""
        return self.results.stopping

    def steps(self, batches: Prefetcher) -> None:
        """Steps, validations and checkpoints to the end, a stop, or the need to go back."""
        self.compare()
        while self.step < self.setup.plan.steps and not self.stopping:
            self.profiled_step(batches)
            if self.startup is not None:
                self.results.read()
                self.startup.lap("first step")
                log.info(self.startup.line())
                self.startup = None
            if self.step == self.first_step + 1:
                gc.collect()
                gc.freeze()  # what lives now lives to the end: later collections are short
            every = self.setup.config["health"]["compare_every"]
            if every and self.step % every == 0:
                self.compare()
            validates = self.step % self.knobs["val_every"] == 0
            saves = self.step % self.knobs["save_every"] == 0
            if validates or saves:
                self.results.read()  # may find that the run must go back
            if self.guard.stretch:
                return
            if validates and not self.stopping:
                self.validate()
            if saves:
                self.save()

    def roll_back(self) -> None:
        """Go back to before the first of the recent skips, and past the data read since then."""
        skips, left = self.guard.stretch, self.step
        limit, run_dir = self.setup.guard.max_rollbacks, self.setup.run_dir
        if self.course.number >= limit:
            raise rollback.exhausted(run_dir, limit, skips)
        began = time.perf_counter()
        self.watch.at("rollback")
        self.saver.settle()
        self.report_saves()  # of the course that ends here
        self.saver.latest = None
        path = rollback.go_back(run_dir, skips[0].step, self.start, self.load, self.world)
        data = self.course.data
        first, end = data.at(skips[0].step - 1), data.at(skips[-1].step - 1) + 1
        if path is None:
            self.start_over()
        self.saved_step = self.step
        self.course = self.course.next(first, end)
        self.validated, self.comparison.compared_step = {}, None
        self.log.rewind(self.step, self.course.number)
        event = {
            "from_step": left,
            "to_step": self.step,
            "data_steps": [first, end],
            "samples": [first * self.rows, end * self.rows],
            "reason": rollback.reason(skips),
            "checkpoint": None if path is None else str(path),
            "data_stream": self.setup.loader.stream_hash,
            "seconds": time.perf_counter() - began,
        }
        self.log.event(left, "rollback", event)
        if self.world.rank == 0:
            resume.set_later_aside(run_dir, self.step)

    def profiled_step(self, batches: Prefetcher) -> None:
        """A step, and what is written after the last one that was to be profiled."""
        if self.profile is None:
            self.one_step(batches)
            return
        self.profile.before_step()
        self.one_step(batches)
        if self.profile.after_step():
            with self.paused():
                self.watch.at("profile", slow=True)
                self.profile.write()

    def one_step(self, batches: Prefetcher) -> None:
        """Forward and backward of this rank's micro-batches, and the update."""
        self.watch.begin_step(self.step + 1)
        micros = next(batches)
        self.watch.at("forward")
        self.stragglers.begin(self.step + 1, batches.waited_seconds)
        self.meter.waited += batches.waited_seconds
        data_step = self.course.data.at(self.step)
        for text in self.faults.starting(self.step + 1, data_step):
            self.log.event(self.step + 1, "fault", {"fault": text})
        self.faults.before(self.step + 1)
        spoil = self.faults.spoil(data_step)
        first_row = self.world.rank * (self.rows // self.world.size)
        for i, micro in enumerate(micros):
            ctx = self.engine.module.model.stack.drawn(
                micro.ctx,
                seed=self.setup.config["seed"],
                step=self.step,
                first_row=first_row + i * self.setup.micro_batch,
            )
            last = i == len(micros) - 1
            self.engine.accumulate(replace(micro, ctx=ctx), last=last, spoil=spoil)
        ratio = self.setup.schedule.ratio(self.step)
        lr = self.setup.optimizer.lr * ratio
        self.step += 1
        self.stop.install()
        stop = self.stop.requested is not None or self.saver.exhausted
        limits = self.guard.limits(self.step)
        pending = self.engine.update(ratio, stop=stop, limits=limits)
        self.faults.after(self.step, self.engine.module)
        self.watch.at("read_results")
        samples = (data_step * self.rows, (data_step + 1) * self.rows)
        self.results.add(Made(self.step, lr, limits, samples, pending))
        self.report_saves()

    def validate(self) -> None:
        """Loss and bits per byte over the held-out rows."""
        if self.held_out is None:
            return
        self.watch.slow |= not self.validated  # the first may compile
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
        self.compare()
        self.watch.at("save")
        with self.paused():
            trainer = {
                "step": self.step,
                "optimizer_steps": self.engine.optimizer_steps(),
                "skipped": self.guard.skipped,
                "lr_ratio": self.setup.schedule.ratio(self.step - 1) if self.step else None,
                "tokens": self.step * self.step_tokens,
                "next_sample": self.course.data.at(self.step) * self.rows,
                **self.course.to_trainer(),
                "guard": self.guard.state(),
                "data_fingerprint": self.setup.loader.fingerprint,
                "data_stream": self.setup.loader.stream_hash,
                "interval": self.meter.state(),
                # A stop does not wait for a validation; who continues makes up for it.
                "validation_due": self.step % self.knobs["val_every"] == 0
                and self.validated.get("step") != self.step,
                "run_id": self.run_id,
            }
            states = resume.generators(self.device)
            self.saver.writer.retention.suspect = self.guard.suspect
            self.saver.save(self.step, self.engine.fragments(), states, trainer)
        self.saved_step = self.step

    def compare(self) -> None:
        """RunFailed on all ranks unless they hold the same weights and count the same."""
        if self.world.size == 1 or self.comparison.compared_step == self.step:
            return
        with self.paused():
            self.watch.at("compare")
            counters = {
                "step": self.step,
                "data position": self.course.data.at(self.step),
                "rollbacks": self.course.number,
                "skipped steps": self.guard.skipped,
            }
            self.comparison.check(self.step, counters)

    def report_saves(self) -> None:
        """Note the saves that became durable, or failed, since the last call."""
        for save in self.saver.take_finished():
            if save.failure is None:
                self.log.interval(save.step, "save", save.metrics(), now=self.step)
            else:
                self.log.event(save.step, "save_failed", {"reason": str(save.failure)})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not the steps'."""
        self.results.read()
        began = time.perf_counter()
        yield
        self.meter.pause(time.perf_counter() - began)

    def summarise(self) -> dict:
        """What the run came to; rank 0 writes it to summary.json."""
        planned = self.setup.plan.memory[self.setup.zero.stage].total
        summary = {
            "finished": self.step == self.setup.plan.steps,
            "step": self.step,
            "tokens": self.step * self.step_tokens,
            "skipped": self.guard.skipped,
            "rollbacks": self.course.number,
            "val": self.validated or None,
            "save_failures": self.saver.failed,
            "checkpoint": str(self.saver.writer.path(self.step)),
            "ranks": self.world.size,
            **self.meter.overall(),
            "memory": memory_used(self.device, planned),
        }
        self.log.summary(summary)
        return summary

    def close(self) -> None:
        gc.unfreeze()
        self.watch.at("save")
        self.saver.close()
        self.report_saves()
        self.log.close()
        self.engine.close()
