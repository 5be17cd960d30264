"""Cost: what one call of a kernel must do, in FLOPs and bytes, whatever implements it.

A kernel's cost() returns the pair (forward, backward). FLOPs count a multiply-add as 2 and only
model work: what a mask hides is not counted, and what a backward pass computes a second time is
listed apart. MFU uses `flops`; a lower bound of the run time uses both (Cost.seconds).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """flops: model FLOPs. recomputed_flops: done again because keeping the result costs more.

    bytes_read, bytes_written: every operand once, as if on-chip memory held the rest.
    saved_bytes: what the forward pass keeps for the backward pass.
    """

    flops: float
    bytes_read: float
    bytes_written: float
    saved_bytes: float = 0.0
    recomputed_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            saved_bytes=self.saved_bytes + other.saved_bytes,
            recomputed_flops=self.recomputed_flops + other.recomputed_flops,
        )

    def seconds(self, *, flops_per_second: float, bytes_per_second: float) -> float:
        """Roofline: no implementation on a device with these peaks is faster."""
        compute = (self.flops + self.recomputed_flops) / flops_per_second
        memory = (self.bytes_read + self.bytes_written) / bytes_per_second
        return max(compute, memory)
