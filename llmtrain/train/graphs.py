"""train.cuda_graphs: forward and backward of a micro-batch, launched as one CUDA graph.

A small model's kernels end sooner than Python launches the next ones: the device waits for the
host. A graph is recorded once and then launched whole, so the host's part is gone.

Micro-batches of equal shapes share a graph. Their first passes run as ever, which compiles what
there is to compile and shows whether the host waits for the device anywhere: what waits cannot be
recorded, and goes on as ever. The recorded pass reads its inputs from memory of its own, to which
each micro-batch is copied, and adds its gradients to memory of its own, which is zero at the start
of a step; the kernels are the same, and so are the numbers.

For one rank with whole weights: where ranks sum gradients within the backward pass, DeepSpeed's
hooks are Python. The graph keeps its activations' memory between the steps.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from llmtrain import accounting
from llmtrain.data.batch import MicroBatch

log = logging.getLogger(__name__)

WARM_UPS = 2  # passes as ever before a shape's graph
MOST = 8  # graphs; micro-batches of further shapes run as ever
LAUNCH_BOUND = 4e-3  # seconds of a block and micro-batch at the device's peak: auto records below
WAITS = "called a synchronizing CUDA operation"

# (sums, aux) of a micro-batch, as TrainModule gives them, after its backward pass.
Pass = Callable[[MicroBatch], tuple[Tensor, dict[str, Tensor]]]


def why_not(*, ranks: int, stage: int, device: torch.device, checkpointing: str) -> str | None:
    """Why no pass can be recorded, or None."""
    if device.type != "cuda":
        return f"train.device is {device.type}, which has none"
    if ranks > 1:
        return f"{ranks} ranks sum gradients within the backward pass; graphs are for one"
    if stage > 0:
        return f"ZeRO stage {stage} works within the passes; graphs are for stage 0"
    if checkpointing != "none":
        return "train.activation_checkpointing reads the random generators, which a graph cannot"
    return None


def launch_bound(flops_per_token: float, tokens: int, layers: int, device: torch.device) -> bool:
    """Whether a micro-batch's kernels are so short that launching them takes longer."""
    peak = accounting.peak_flops(torch.cuda.get_device_name(device))
    return peak is not None and flops_per_token * tokens / layers / peak < LAUNCH_BOUND


class Static:
    """A tensor's memory of its own, of the same shape and strides; expanded sides stay expanded."""

    def __init__(self, like: Tensor):
        self.where = tuple(slice(0, 1) if s == 0 else slice(None) for s in like.stride())
        part = like[self.where]
        self.memory = torch.empty_strided(
            part.shape, part.stride(), dtype=like.dtype, device=like.device
        )
        self.tensor = self.memory.expand(like.shape)
        self.copy(like)

    def copy(self, given: Tensor) -> None:
        self.memory.copy_(given[self.where], non_blocking=True)


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a dataclass and of those within, in order."""
    for field in fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, Tensor):
            yield inner
        elif is_dataclass(inner):
            yield from tensors(inner)


def with_tensors(value: object, given: Iterator[Tensor]) -> object:
    """The same dataclass with other tensors, in the order of tensors()."""
    changes: dict[str, object] = {}
    for field in fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, Tensor):
            changes[field.name] = next(given)
        elif is_dataclass(inner):
            changes[field.name] = with_tensors(inner, given)
    return replace(value, **changes)


def signature(value: object) -> tuple:
    """What two micro-batches share whose passes are the same kernels: shapes, and what the host
    knows."""
    parts = []
    for field in fields(value):
        inner = getattr(value, field.name)
        if isinstance(inner, Tensor):
            parts.append((tuple(inner.shape), inner.stride(), inner.dtype))
        elif is_dataclass(inner):
            parts.append(signature(inner))
        else:
            parts.append(inner)
    return tuple(parts)


class Recorded:
    """A pass in a CUDA graph. pool: memory that graphs share, None for the first."""

    def __init__(self, work: Callable[[], object], pool: object):
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self.made = work()

    def replay(self) -> object:
        self.graph.replay()
        return self.made

    @property
    def pool(self) -> object:
        return self.graph.pool()


class Shape:
    """What is known of the micro-batches of one signature."""

    def __init__(self, micro: MicroBatch):
        self.inputs = [Static(z) for z in tensors(micro)]
        self.micro = with_tensors(micro, (static.tensor for static in self.inputs))
        self.passes, self.waits, self.recorded = 0, None, None

    def take(self, micro: MicroBatch) -> None:
        for static, given in zip(self.inputs, tensors(micro), strict=True):
            static.copy(given)


class MicroGraphs:
    """Runs micro-batches, as ever or recorded.

    eager: the pass as ever. plain: the pass that is recorded; it adds to the gradients that are
    there. required: ValueError where a pass cannot be recorded, else it goes on as ever.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        eager: Pass,
        plain: Pass,
        required: bool = False,
    ):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.gradients: list[Tensor] = []
        self.eager, self.plain, self.required = eager, plain, required
        self.shapes: dict[tuple, Shape] = {}
        self.pool: object = None

    def run(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of a micro-batch; what comes back is not written again."""
        shape = self.shape_of(micro)
        if shape is None or shape.waits is not None:
            return self.eager(micro)
        shape.take(micro)
        if shape.passes < WARM_UPS:
            with self.watched(shape):
                made = self.eager(shape.micro)
            shape.passes += 1
            return made
        self.own_gradients()
        if shape.recorded is None:
            self.make(shape)
        sums, aux = shape.recorded.replay()
        return sums.clone(), {name: value.clone() for name, value in aux.items()}

    def shape_of(self, micro: MicroBatch) -> Shape | None:
        """What is known of its kind; None when there are too many kinds."""
        key = signature(micro)
        if key not in self.shapes and len(self.shapes) < MOST:
            self.shapes[key] = Shape(micro)
            if len(self.shapes) == MOST:
                log.info("CUDA graphs: %d kinds of micro-batches; further ones go without", MOST)
        return self.shapes.get(key)

    @contextmanager
    def watched(self, shape: Shape) -> Iterator[None]:
        """Note whether the host waits for the device in a pass. The first may: it compiles."""
        if shape.passes < WARM_UPS - 1 or not torch.cuda.is_available():
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [warning for warning in caught if WAITS in str(warning.message)]
        if waits:
            shape.waits = f"{waits[0].filename}:{waits[0].lineno}"
            if self.required:
                raise ValueError(
                    f"train.cuda_graphs=always: the pass waits for the device ({shape.waits}), "
                    "expected one that does not; set train.cuda_graphs=auto"
                )
            log.info("CUDA graphs: none, as the pass waits for the device (%s)", shape.waits)

    def own_gradients(self) -> None:
        """Let every parameter's gradient be in the memory that graphs add to, with what it is."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
        pairs = [(p, own) for p, own in zip(self.parameters, self.gradients) if p.grad is not own]
        fresh = [own for p, own in pairs if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        there = [(p.grad, own) for p, own in pairs if p.grad is not None]
        if there:
            torch._foreach_copy_([own for _, own in there], [grad for grad, _ in there])
        for p, own in pairs:
            p.grad = own

    def make(self, shape: Shape) -> None:
        """Record the pass of a shape, which does not run by that."""
        gc.collect()  # of what a pass left, while nothing is recorded
        shape.recorded = Recorded(lambda: self.plain(shape.micro), self.pool)
        self.pool = shape.recorded.pool
        log.info("CUDA graphs: recorded the pass of a micro-batch, %d by now", self.recorded)

    @property
    def recorded(self) -> int:
        return sum(shape.recorded is not None for shape in self.shapes.values())
