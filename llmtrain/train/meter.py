"""What an interval of steps amounts to: means, rates, memory."""

from __future__ import annotations

import math
import resource

import torch

from llmtrain import accounting
from llmtrain.train.engine import StepResult, bits_per_byte


class Meter:
    """Collects step results and gives the values of a line of metrics.jsonl.

    The first step after a start or a load (compilation, allocation) and pauses (validation,
    checkpoints) do not count towards rates. step_tokens: of a global batch; flops: of a training
    token.
    """

    def __init__(self, *, step_tokens: int, flops: float, device: torch.device, devices: int):
        self.step_tokens, self.flops = step_tokens, flops
        self.device, self.devices = device, devices
        self.total_seconds = self.total_steps = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin an interval."""
        self.nats = self.ce_nats = self.tokens = self.text_bytes = 0.0
        self.norms: list[float] = []
        self.aux: dict[str, float] = {}
        self.waited = self.seconds = 0.0
        self.steps = 0

    def state(self) -> dict:
        """What the interval has collected, times aside; for a checkpoint within it."""
        names = ("nats", "ce_nats", "tokens", "text_bytes")
        sums = {name: getattr(self, name) for name in names}
        return {**sums, "norms": list(self.norms), "aux": dict(self.aux)}

    def restore(self, state: dict) -> None:
        """Go on with the interval that a checkpoint was made in."""
        self.nats, self.ce_nats = state["nats"], state["ce_nats"]
        self.tokens, self.text_bytes = state["tokens"], state["text_bytes"]
        self.norms, self.aux = list(state["norms"]), dict(state["aux"])

    def pause(self, seconds: float) -> None:
        self.seconds -= seconds

    def add(self, result: StepResult) -> None:
        if result.seconds is None:  # the rates start after it
            self.waited = self.seconds = 0.0
        else:
            self.seconds += result.seconds
            self.steps += 1
        if result.applied:
            self.nats += result.loss * result.tokens
            self.ce_nats += result.ce * result.tokens
            self.tokens += result.tokens
            self.text_bytes += result.text_bytes
            self.norms.append(result.grad_norm)
            self.aux = result.aux

    def rate(self, steps: float, seconds: float) -> dict[str, float]:
        """tokens_per_second, and mfu where the device's peak is known."""
        if not steps or not seconds:
            return {}
        per_second = steps * self.step_tokens / seconds
        values = {"tokens_per_second": per_second}
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            mfu = accounting.mfu(per_second, self.flops, name, self.devices)
            if mfu is not None:
                values["mfu"] = mfu
        return values

    def take(self) -> dict[str, float]:
        """The interval's values; a new one begins. Auxiliary metrics are the last step's."""
        seconds = self.seconds
        self.total_seconds += seconds
        self.total_steps += self.steps
        values = {
            "loss": self.nats / self.tokens if self.tokens else math.nan,
            "bits_per_byte": bits_per_byte(self.ce_nats, self.text_bytes),
            "grad_norm": sum(self.norms) / len(self.norms) if self.norms else math.nan,
            **self.rate(self.steps, seconds),
        }
        if self.steps:
            values["step_seconds"] = seconds / self.steps
            values["data_wait_seconds"] = self.waited / self.steps
        values["memory_gib"] = peak_memory(self.device) / 2**30
        values |= self.aux
        self.clear()
        return values

    def overall(self) -> dict[str, float]:
        """Rates over everything since the first step of this start."""
        return self.rate(self.total_steps, self.total_seconds)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: on the GPU by tensors, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_used(device: torch.device, planned: float) -> dict[str, float]:
    """The peak in GiB, and on a GPU the planner's bytes beside it."""
    peak = peak_memory(device)
    used = {"peak_gib": peak / 2**30}
    if device.type == "cuda":
        used |= {"planned_gib": planned / 2**30, "planned/peak": planned / peak}
    return used
