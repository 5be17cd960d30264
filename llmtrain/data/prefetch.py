"""Preparing the micro-batches of the coming optimizer steps in a thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from llmtrain.data.batch import Batch, MicroBatch
from llmtrain.data.skips import DataSteps

EVERY = DataSteps()


class Rows(Protocol):
    """What a prefetcher needs of a loader."""

    rows_per_epoch: int

    def batch(self, first_sample: int, rows: int) -> Batch: ...


class Prefetcher:
    """Iterator over optimizer steps; each item is the list of this rank's micro-batches.

    A step that reads data step d of global_rows = G rows: rank r of W takes the samples
    [d*G + r*G/W, d*G + (r+1)*G/W), micro_rows at a time. Ends before stop_step (never, if None).
    `depth` steps are prepared ahead. An error of the thread is raised by the step that it belongs
    to. Use as a context manager, or call close(). For CUDA the thread pins the tensors; the copies
    do not block and run on the stream of whoever asks for the step.

    waited_seconds: how long the last step was waited for.
    """

    def __init__(
        self,
        loader: Rows,
        *,
        start_step: int,
        global_rows: int,
        rank: int,
        world: int,
        micro_rows: int,
        mask_documents: bool,
        device: torch.device | str,
        data: DataSteps = EVERY,
        stop_step: int | None = None,
        depth: int = 2,
    ):
        check_rows(loader, global_rows, world, micro_rows)
        self.loader = loader
        self.global_rows = global_rows
        self.rank_rows = global_rows // world
        self.rank = rank
        self.micro_rows = micro_rows
        self.mask_documents = mask_documents
        self.device = torch.device(device)
        self.data = data
        self.stop_step = stop_step
        self.waited_seconds = 0.0
        self._next_step = start_step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: deque[Future[list[MicroBatch]]] = deque()
        for _ in range(depth):
            self._submit()

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if not self._coming:
            raise StopIteration
        start = time.perf_counter()
        micro_batches = self._coming.popleft().result()
        self.waited_seconds = time.perf_counter() - start
        self._submit()
        return [micro.to(self.device) for micro in micro_batches]

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is prepared and wait until the thread has ended."""
        self._coming.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step, on the host (pinned for CUDA)."""
        first = self.data.at(step) * self.global_rows + self.rank * self.rank_rows
        micro_batches = []
        for start in range(first, first + self.rank_rows, self.micro_rows):
            batch = self.loader.batch(start, self.micro_rows)
            micro = MicroBatch.of(batch, mask_documents=self.mask_documents)
            micro_batches.append(micro.pinned() if self.device.type == "cuda" else micro)
        return micro_batches

    def _submit(self) -> None:
        if self.stop_step is None or self._next_step < self.stop_step:
            self._coming.append(self._pool.submit(self.step, self._next_step))
            self._next_step += 1


def check_rows(loader: Rows, global_rows: int, world: int, micro_rows: int) -> None:
    """Raises ValueError when the rows cannot be shared out."""
    if loader.rows_per_epoch < world:
        raise ValueError(
            f"data: {world} ranks, but an epoch has {loader.rows_per_epoch} rows; expected at "
            "least one row a rank; use fewer ranks, lower train.seq_len or prepare more text"
        )
    if global_rows < 1 or global_rows % world:
        raise ValueError(
            f"train.global_batch_tokens: {global_rows} rows a step on {world} ranks; expected a "
            "multiple of the number of ranks; set train.global_batch_tokens"
        )
    if micro_rows < 1 or (global_rows // world) % micro_rows:
        raise ValueError(
            f"train.micro_batch={micro_rows}: does not divide the {global_rows // world} rows of "
            "a rank and step; expected a divisor; set train.micro_batch"
        )
