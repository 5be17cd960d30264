"""train.profile=true: a trace of a few steps, a snapshot of the memory, and an account of the time.

    <run folder>/profile/trace.json.gz   for chrome://tracing or https://ui.perfetto.dev
                         memory.pickle   allocations of those steps, for https://pytorch.org/memory_viz
                         profile.md      where the time went (account.py)

Rank 0 alone is profiled. The tracing itself slows the steps down, most of all those with many small
kernels: rates are taken without it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from llmtrain.train.account import Event, Work, page

log = logging.getLogger(__name__)

FOLDER = "profile"
MOST_ALLOCATIONS = 200_000  # events of the snapshot


class Profile:
    """Profiles the steps first .. first + steps - 1 of this start; work: of a step."""

    def __init__(self, run_dir: Path, device: torch.device, *, first: int, steps: int, work: Work):
        self.folder, self.device = run_dir / FOLDER, device
        self.first, self.steps, self.work = first, steps, work
        self.made = 0  # steps of this start
        self.trace: torch.profiler.profile | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def before_step(self) -> None:
        """Begin, if the step that comes is the first of those meant."""
        self.made += 1
        if self.made != self.first:
            return
        if self.on_gpu:
            # Python's stacks alone: to find the names of C++ ones takes minutes
            options = {"max_entries": MOST_ALLOCATIONS, "stacks": "python"}
            torch.cuda.memory._record_memory_history(**options)
            torch.cuda.synchronize(self.device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self.trace = torch.profiler.profile(activities=activities, acc_events=True)
        self.trace.start()
        self.began = time.perf_counter()

    def after_step(self) -> bool:
        """Whether the steps are complete; the clock then stops, and write() is to be called."""
        if self.trace is None or self.made < self.first + self.steps - 1:
            return False
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.wall = 1e6 * (time.perf_counter() - self.began)
        return True

    def write(self) -> None:
        """End the tracing and write the files."""
        assert self.trace is not None
        trace, self.trace = self.trace, None
        trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.folder / "trace.json.gz"))
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        last = self.first + self.steps - 1
        text = page(
            self.events(trace),
            wall=self.wall,
            steps=self.steps,
            work=self.work,
            concurrent=self.on_gpu,
            note=f"Steps {self.first} to {last} of a start on {self.work.device}, while they were "
            "traced.",
        )
        (self.folder / "profile.md").write_text(text, encoding="utf-8")
        log.info("profile of steps %d to %d: %s", self.first, last, self.folder / "profile.md")

    def events(self, trace: torch.profiler.profile) -> list[Event]:
        """Kernels of the GPU; on a CPU operations, as long as their own time."""
        if self.on_gpu:
            return [
                Event(name=e.name, start=e.time_range.start, end=e.time_range.end)
                for e in trace.events()
                if e.device_type == DeviceType.CUDA and not e.is_user_annotation
            ]
        return [
            Event(name=e.name, start=e.time_range.start, end=e.time_range.start + own)
            for e in trace.events()
            if (own := e.self_cpu_time_total) > 0
        ]
