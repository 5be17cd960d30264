"""Saving while training goes on: a copy in host memory, and a thread that makes it durable.

    save()      waits for the save before, copies this rank's fragments, random generators and
                counters into host memory (allocated once: one copy of the rank's share of weights
                and optimizer state), and starts the thread
    the thread  writes and commits (checkpoint.py), talking to the other ranks in a process group
                of its own, so that no collective of the training meets one of a save
    settle()    waits for the thread; at_end() too, after the last step, which is no stall;
                finish() fails if the last save did

All ranks learn one outcome of each save, in the thread. A failure is told at once and counted;
training goes on and the next save is another try. After `failures` of them in a row `exhausted` is
true, which each rank adds to the stop request in the step's all-reduce: all leave the loop after
the same step, and settle() raises the same error on each. A rank that dies closes its connections,
which ends the others' wait in the thread with an error; that ends their runs too.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.distributed import leave_side_group
from llmtrain.train.checkpoint import CheckpointWriter, SaveFailed
from llmtrain.train.image import Copied, HostMemory, Image, Streamed
from llmtrain.train.partitions import Fragment

log = logging.getLogger(__name__)

# A wait for the save before that is worth a message, in seconds.
LONG_WAIT = 1.0
# Seconds between looks at the thread's progress while it is waited for.
POLL = 1.0


@dataclass(kw_only=True)
class Save:
    """One save. stall_seconds: that training waited; end_wait_seconds: that the program did after
    the last step; write_seconds: from the copy until durable; bytes: of all ranks' files; failure:
    why there is no such checkpoint."""

    step: int
    stall_seconds: float = 0.0
    end_wait_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes: int = 0
    failure: SaveFailed | None = None

    def metrics(self) -> dict[str, float]:
        return {
            "stall_seconds": self.stall_seconds,
            "end_wait_seconds": self.end_wait_seconds,
            "write_seconds": self.write_seconds,
            "bytes": self.bytes,
            "bytes_per_second": self.bytes / self.write_seconds,
        }


class Saver:
    """background: False writes within save(), which then needs no host memory. failures: in a row
    that end the run. alive: called while the thread is waited for and writes. Every method but
    take_finished is called by all ranks at the same step."""

    def __init__(
        self,
        writer: CheckpointWriter,
        *,
        background: bool,
        failures: int,
        alive: Callable[[], None] = lambda: None,
    ):
        self.writer, self.background, self.limit = writer, background, failures
        self.alive = alive
        self.memory: HostMemory | None = None
        self.reservation: Future[HostMemory] | None = None
        self.thread: threading.Thread | None = None
        self.source: Copied | None = None
        self.latest: Save | None = None
        self.finished: deque[Save] = deque()
        self.failed_in_a_row = self.failed = 0
        self.crash: Exception | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the run cannot go on; known to some ranks earlier than to others."""
        return self.crash is not None or self.failed_in_a_row >= self.limit

    def reserve(self, fragments: list[Fragment], generators: dict[str, Tensor]) -> None:
        """Begin to allocate the host memory, rather than in the first save. In a thread: locking
        its pages takes seconds, in which the first step compiles."""
        if self.background:
            image = Image.of(fragments, generators, self.writer.world.rank)
            thread = ThreadPoolExecutor(1, thread_name_prefix="reserve")
            self.reservation = thread.submit(host_memory, image)
            thread.shutdown(wait=False)

    def memory_for(self, image: Image) -> HostMemory:
        if self.reservation is not None:
            reservation, self.reservation = self.reservation, None
            self.memory = reservation.result()
        if self.memory is None or not self.memory.holds(image):
            self.release()
            self.memory = HostMemory(image)
        return self.memory

    def save(
        self, step: int, fragments: list[Fragment], generators: dict[str, Tensor], trainer: dict
    ) -> None:
        """Begin to save what these tensors hold now; SaveFailed after too many failures."""
        began = time.perf_counter()
        self.settle()
        waited = time.perf_counter() - began
        if waited > LONG_WAIT:
            log.warning(
                "step %d: training waited %.1f s for the checkpoint before to become durable; "
                "raise train.save_every, or use a faster disk",
                step,
                waited,
            )
        save = self.latest = Save(step=step)
        image = Image.of(fragments, generators, self.writer.world.rank)
        if self.background:
            self.source = Copied(image, self.memory_for(image))
            # Not waited for when a person interrupts twice: what it writes is no checkpoint yet.
            self.thread = threading.Thread(
                target=self.write,
                args=(save, image, self.source, copy.deepcopy(trainer)),
                name=f"save-{step}",
                daemon=True,
            )
            self.thread.start()
        else:
            self.write(save, image, Streamed(image), trainer)
        save.stall_seconds += time.perf_counter() - began

    def write(self, save: Save, image: Image, source: Copied | Streamed, trainer: dict) -> None:
        """Make a save durable, note its outcome, and delete what it makes superfluous."""
        began = time.perf_counter()
        try:
            save.bytes = self.writer.write(save.step, image, source, trainer)
            save.write_seconds = time.perf_counter() - began
            self.failed_in_a_row = 0
            self.finished.append(save)
            self.writer.delete_old(save.step)
        except SaveFailed as error:
            save.failure = error
            self.failed += 1
            self.failed_in_a_row += 1
            self.finished.append(save)
            log.error(
                "%s (failure %d in a row; training ends at %d, train.save_failures)",
                error,
                self.failed_in_a_row,
                self.limit,
            )
        except Exception as error:  # the border of the thread: settle() raises it
            self.crash = error

    def wait(self) -> None:
        """Until the thread has ended."""
        seen = None
        while self.thread is not None and self.thread.is_alive():
            if seen != self.source.number:
                seen = self.source.number
                self.alive()
            self.thread.join(POLL)
        self.thread = None

    def settle(self) -> None:
        """Wait until nothing is being written. Raises when the run cannot go on."""
        self.wait()
        if self.crash is not None:
            raise self.crash
        if self.failed_in_a_row >= self.limit:
            raise SaveFailed(
                f"training: the last {self.failed_in_a_row} saves failed, expected fewer than "
                f"train.save_failures={self.limit}. The last one: {self.latest.failure}"
            )

    def at_end(self) -> None:
        """settle() after the last step: what it waits, no training waited."""
        began = time.perf_counter()
        self.settle()
        if self.latest is not None:
            self.latest.end_wait_seconds += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the last save is durable; SaveFailed when it is not to be."""
        self.at_end()
        if self.latest is not None and self.latest.failure is not None:
            raise self.latest.failure

    def take_finished(self) -> list[Save]:
        """The saves that ended since the last call, durable or failed."""
        return [self.finished.popleft() for _ in range(len(self.finished))]

    def release(self) -> None:
        if self.reservation is not None:
            reservation, self.reservation = self.reservation, None
            if reservation.exception() is None:  # else nothing is held, and no save wanted it
                self.memory = reservation.result()
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def close(self) -> None:
        """Wait for what is being written, so that it is not lost to an error elsewhere."""
        if self.thread is not None and self.thread.is_alive():
            log.info("waiting for the checkpoint of step %d to become durable", self.latest.step)
        self.wait()
        self.release()
        self.writer.close()
        leave_side_group(self.writer.group)


def host_memory(image: Image) -> HostMemory:
    """Memory for an image. A thread of its own begins on the first GPU, whichever the rank's is."""
    devices = {tensor.device for tensor in image.tensors if tensor.is_cuda}
    for device in devices:
        torch.cuda.set_device(device)
    return HostMemory(image)
