"""The engine: forward, backward and optimizer step under DeepSpeed. No other file imports it.

What DeepSpeed does: divide state among ranks and sum gradients over them. What is done here:

    loss        sum over all tokens of the step / their number, over ranks and micro-batches
    norm        of that loss's gradient over all parameters, before clipping
    clipping    g * min(1, grad_clip / (norm + 1e-6))
    skipping    a step whose loss or norm is not finite, or above the limits that it was given,
                changes nothing, on every rank alike

One small all-reduce a step carries the sums, the norm, the stop request and what channels sum over
the step. Its results stay on the device: clipping factor and skip flag go into the optimizer's
kernels, and the host reads them one step later, so that a step never waits for the GPU.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist
from llmtrain_kernels.adamw import sum_of_squares
from torch import Tensor
from torch.autograd import Variable

from llmtrain.data.batch import MicroBatch
from llmtrain.distributed import BACKENDS, TIMEOUT, World
from llmtrain.train.copies import WeightCopies
from llmtrain.train.faults import UNSPOILED, Spoil
from llmtrain.train.graphs import MicroGraphs
from llmtrain.train.guard import (
    APPLIED,
    GRADIENT_NOT_FINITE,
    LOSS_NOT_FINITE,
    LOSS_SPIKE,
    NO_LIMITS,
    NORM_SPIKE,
    Limits,
)
from llmtrain.train.module import SUMS, TrainModule
from llmtrain.train.muon import OrthogonalMomentum
from llmtrain.train.partitions import FlatPartitions, Fragment, Replicated, WeightPartitions
from llmtrain.train.reference import Step
from llmtrain.train.truth import OptimizerCheck
from llmtrain.train.watchdog import Watch
from llmtrain.train.zero import Zero0, deepspeed_config, for_ranks


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, over all ranks.

    loss, ce: nats per token (loss with its auxiliary terms); grad_norm: before clipping;
    tokens, text_bytes: of the targets that counted; code: APPLIED, or why it was skipped; seconds:
    from the end of the step before it to its own, None for the first after a start or a load.
    """

    loss: float
    ce: float
    grad_norm: float
    tokens: float
    text_bytes: float
    code: int
    stop: bool
    aux: dict[str, float]
    seconds: float | None

    @property
    def applied(self) -> bool:
        return self.code == APPLIED

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.ce * self.tokens, self.text_bytes)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    return nats / math.log(2) / text_bytes if text_bytes else math.nan


class Pending:
    """The result of a step that the device may still be computing. before: of the step before it,
    None for no such one; steps are read in their order."""

    def __init__(self, totals: Tensor, aux_names: list[str], before: Pending | None = None):
        self.aux_names, self.before = aux_names, before
        if totals.is_cuda:
            self.host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
            self.host.copy_(totals, non_blocking=True)
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.host, self.event = totals, None
            self.ended = time.perf_counter()

    def read(self) -> StepResult:
        """Wait for the device and give the result."""
        if self.event is not None:
            self.event.synchronize()
        seconds, self.before = self.seconds(), None
        loss, ce, tokens, text_bytes, norm, code, stop, *aux = self.host.tolist()
        tokens = max(tokens, 1e-30)
        return StepResult(
            loss=loss / tokens,
            ce=ce / tokens,
            grad_norm=norm,
            tokens=tokens,
            text_bytes=text_bytes,
            code=int(code),
            stop=bool(stop),
            aux=dict(zip(self.aux_names, aux, strict=True)),
            seconds=seconds,
        )

    def seconds(self) -> float | None:
        """On the device's clock: the host is now ahead of it, now waits for it."""
        if self.before is None:
            return None
        if self.event is None:
            return self.ended - self.before.ended
        return self.before.event.elapsed_time(self.event) / 1e3


def verdict(loss: Tensor, mean: Tensor, norm: Tensor, limits: Limits) -> Tensor:
    """What a step comes to, a code of guard.py as a float: of several reasons the lowest."""
    code = torch.where(norm > limits.grad_norm, NORM_SPIKE, APPLIED)
    code = torch.where(mean > limits.loss, LOSS_SPIKE, code)
    code = torch.where(norm.isfinite(), code, GRADIENT_NOT_FINITE)
    return torch.where(loss.isfinite(), code, LOSS_NOT_FINITE).to(norm.dtype)


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this kind of device (it looks once, at its import)."""
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed calls collectives by names that torch >= 2.13 announces to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    import deepspeed.ops

    # The shared-memory collectives act only under DeepSpeed's own launcher (it sets LOCAL_SIZE),
    # but would be compiled by every CPU run: half a minute, and a C++ compiler as a requirement.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """One model in training on this rank, which has joined the process group (distributed.start).

    step_tokens: tokens of a full global batch; grad_clip: None for no clipping; check: of the first
    step that is applied; watch: is told where a step stands; compute_dtype: of the activations;
    graphs: whether micro-batches run as CUDA graphs (graphs.py), on one rank.
    The optimizer is built over the module's own parameters, before any of this. shapes: name ->
    shape of every parameter and persistent buffer, before any partitioning.
    """

    def __init__(
        self,
        module: TrainModule,
        optimizer: torch.optim.Optimizer,
        *,
        zero: Zero0,
        world: World,
        device: torch.device,
        micro_batch: int,
        step_tokens: int,
        grad_clip: float | None,
        check: OptimizerCheck | None = None,
        watch: Watch | None = None,
        compute_dtype: torch.dtype = torch.float32,
        graphs: Literal["always", "auto"] | None = None,
    ):
        deepspeed = load_deepspeed(device)
        deepspeed.init_distributed(BACKENDS[device.type], timeout=TIMEOUT)
        zero = for_ranks(zero, world.size)
        self.world, self.device = world, device
        self.stream_before = None
        if graphs is not None and device.type == "cuda":  # no graph is recorded on the first stream
            torch.cuda.synchronize(device)
            self.stream_before = torch.cuda.current_stream(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))
        self.watch = watch or Watch()
        self.step_tokens, self.grad_clip = step_tokens, grad_clip
        self.check, self.steps_before = check, 0
        # The true number of tokens is known only after the step's all-reduce; update() corrects.
        self.loss_scale = (world.size if zero.averages else 1) / step_tokens
        module.expect_gradient(self.loss_scale)
        self.config = deepspeed_config(
            zero,
            micro_batch=micro_batch,
            world_size=world.size,
            own_optimizer=type(optimizer) is not torch.optim.AdamW,
        )
        self.optimizer = optimizer
        parameters = {name: tuple(p.shape) for name, p in module.named_parameters()}
        buffers = [name for name in module.state_dict() if name not in parameters]
        self.shapes = parameters | {name: tuple(module.get_buffer(name).shape) for name in buffers}
        self.engine, wrapped, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config
        )
        # One rank has nothing to sum: spare the copies into buckets and back.
        self.engine.enable_backward_allreduce = world.size > 1 or zero.stage > 0
        if zero.stage == 0:
            self.parts = Replicated(module, optimizer, world.rank, world.size)
        elif zero.stage == 3:
            self.parts = WeightPartitions(module, wrapped, world.rank)
        else:
            self.parts = FlatPartitions(module, wrapped, world.rank)
        if isinstance(optimizer, OrthogonalMomentum):
            optimizer.attach(rank=world.rank, size=world.size, partitioned=zero.stage > 0)
        self.module = module
        self.buffers = {name: module.get_buffer(name) for name in buffers}
        # At stage 3 there is no whole weight between the layers' calls.
        self.copies = WeightCopies(module, compute_dtype) if zero.stage < 3 else None
        self.graphs = None
        if graphs is not None:
            passes = {"eager": self.passes, "plain": self.plain_passes}
            self.graphs = MicroGraphs(module, **passes, required=graphs == "always")
        self.last: Pending | None = None
        self.begin_step()

    def begin_step(self) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.aux: dict[str, Tensor] = {}
        self.channel_sums: dict[str, Tensor] = {}
        self.micro_steps = 0

    def accumulate(self, micro: MicroBatch, *, last: bool, spoil: Spoil = UNSPOILED) -> None:
        """Forward and backward of one micro-batch. last: of the step, so that ranks then sum.

        spoil: what a fault on purpose multiplies.
        """
        if self.copies is not None and self.micro_steps == 0:
            self.copies.refresh()
        self.engine.set_gradient_accumulation_boundary(last)
        self.watch.at("forward")
        if self.graphs is not None and spoil == UNSPOILED:
            sums, aux = self.graphs.run(micro)
        else:
            sums, aux = self.passes(micro, last=last, spoil=spoil)
        self.sums += sums
        for name, value in aux.items():
            value = value.to(torch.float64)
            into = self.channel_sums if name.startswith("sum/") else self.aux
            into[name] = into[name] + value if name in into else value
        self.micro_steps += 1

    def passes(
        self, micro: MicroBatch, *, last: bool = False, spoil: Spoil = UNSPOILED
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward: (sums, aux) as TrainModule gives them."""
        loss_sum, sums, aux = self.engine(micro)
        self.watch.lap("forward")
        self.watch.at("backward")
        loss_sum = loss_sum * (self.loss_scale * spoil.gradient)
        if last and self.world.size > 1:
            loss_sum.register_hook(self.when_backward_ends)
        self.engine.backward(loss_sum, scale_wrt_gas=False)
        if spoil.loss != 1.0:  # NaN too
            sums[:2] *= spoil.loss
        return sums, aux

    def plain_passes(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The same kernels without DeepSpeed, which has nothing to add where one rank has all."""
        loss_sum, sums, aux = self.module(micro)
        (loss_sum * self.loss_scale).backward()
        return sums, aux

    def when_backward_ends(self, grad: Tensor) -> None:
        """What follows the backward pass is the sum over ranks."""
        Variable._execution_engine.queue_callback(self.backward_ended)

    def backward_ended(self) -> None:
        self.watch.lap("backward")
        self.watch.at("reduce")

    @torch.no_grad()
    def update(self, ratio: float, *, stop: bool = False, limits: Limits = NO_LIMITS) -> Pending:
        """The optimizer step. ratio: of every group's lr to its own peak; stop: this rank was asked
        to stop, any rank's request counts; limits: above which the step is skipped, the same on all
        ranks."""
        names = sorted(self.aux)
        passes = self.micro_steps * self.world.size
        means = [self.aux[name] / passes for name in names]
        square = sum_of_squares(self.parts.gradients())
        flag = torch.full_like(square, float(stop))
        own = torch.stack([square.to(self.device), flag.to(self.device), *means])
        channel_sums = [self.channel_sums[name].flatten() for name in sorted(self.channel_sums)]
        totals = torch.cat([self.sums, own, *channel_sums])
        self.all_reduce(totals)
        totals, *channel_sums = totals.split([len(SUMS) + len(own), *map(len, channel_sums)])
        loss, tokens, square = totals[0], totals[SUMS.index("weight")], totals[len(SUMS)]
        correction = self.step_tokens / tokens
        norm = square.sqrt() * correction
        code = verdict(loss, loss / tokens, norm, limits)
        applied = code == APPLIED
        scale = torch.ones_like(norm)
        if self.grad_clip is not None:
            scale = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0)
        # Read by the optimizer, as by torch's fused kernel: gradients are divided by grad_scale,
        # and nothing is updated, the step count included, when found_inf is 1.
        self.optimizer.grad_scale = (scale / correction).to(torch.float32)
        self.optimizer.found_inf = (~applied).to(torch.float32)
        self.watch.at("update")
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * ratio
        if self.check is not None:
            self.check.before(self.parts.to_save(), self.parts.gradient)
        self.engine.step()
        if self.check is not None and applied:
            factor = correction / scale
            self.check.after(Step(ratio=ratio, count=self.steps_before + 1, factor=factor.item()))
            self.check = None
        self.parts.stepped()
        head, tail = totals[: len(SUMS)], totals[len(SUMS) + 1 :]
        metrics = self.after_step(channel_sums, applied)
        values = [value.to(norm.dtype).reshape(1) for value in metrics.values()]
        result = torch.cat([head, torch.stack([norm, code]), tail, *values])
        self.begin_step()
        self.last = Pending(result, [*names, *metrics], before=self.last)
        return self.last

    def after_step(self, totals: list[Tensor], applied: Tensor) -> dict[str, Tensor]:
        """Hand channels what they summed over the step, zeros if it was skipped; their metrics."""
        sums = {
            name: torch.where(applied, total, 0).view_as(self.channel_sums[name])
            for name, total in zip(sorted(self.channel_sums), totals, strict=True)
        }
        return self.module.after_step(sums)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Sums over the tokens of all ranks' batches; every rank gives equally many batches."""
        self.module.eval()
        if self.copies is not None:
            self.copies.refresh()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        for micro in batches:
            self.watch.at("validate")
            sums += self.engine(micro)[1]
        self.module.train()
        self.all_reduce(sums)
        return dict(zip(SUMS, sums.tolist()))

    def all_reduce(self, values: Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(values)

    def optimizer_steps(self) -> int:
        """Updates applied so far: the step count of AdamW's bias correction."""
        return int(self.parts.states[0]["step"].item())

    def fragments(self) -> list[Fragment]:
        """This rank's share of a checkpoint, whole; buffers are rank 0's."""
        self.catch_up()
        return self.parts.to_save() + (self.buffer_fragments() if self.world.rank == 0 else [])

    def to_load(self) -> list[Fragment]:
        """What this rank needs of a checkpoint: views to be written, then loaded() be called."""
        return self.parts.to_load() + self.buffer_fragments()

    def buffer_fragments(self) -> list[Fragment]:
        return [
            Fragment(name=name, offset=0, views={"param": buffer.view(-1)})
            for name, buffer in self.buffers.items()
        ]

    def catch_up(self) -> None:
        """Other threads copy on another stream."""
        if self.stream_before is not None:
            torch.cuda.synchronize(self.device)

    def loaded(self, optimizer_steps: int) -> None:
        self.catch_up()
        for state in self.parts.states:
            state["step"].fill_(optimizer_steps)
        self.steps_before, self.last = optimizer_steps, None
        self.parts.loaded()

    def close(self) -> None:
        """Release DeepSpeed's hooks; without it ranks may abort at exit."""
        self.catch_up()
        if self.stream_before is not None:
            torch.cuda.set_stream(self.stream_before)
        self.engine.destroy()
