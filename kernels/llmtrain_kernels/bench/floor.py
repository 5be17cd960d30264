"""What a device allows, measured in the run that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmtrain_kernels.bench.timing import device_ms, eager_ms
from llmtrain_kernels.cost import Cost

COPIED = 2**30  # elements of the copy: 2 GiB in bfloat16, far more than any cache
SIDE = 8192  # of the product


@dataclass(frozen=True, kw_only=True)
class Floor:
    """bytes_per_second: of the fastest way to copy, read and written together; flops_per_second: of
    a bfloat16 matrix product of random numbers."""

    bytes_per_second: float
    flops_per_second: float

    def ms(self, *costs: Cost) -> float:
        """Milliseconds below which no implementation gets, one after the other."""
        rates = {
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
        }
        return 1e3 * sum(cost.seconds(**rates) for cost in costs)


def measure(device: torch.device, *, copied: int = COPIED, side: int = SIDE) -> Floor:
    """The device's floor; on a CPU give small sizes."""
    return Floor(
        bytes_per_second=4 * copied / (copy_ms(device, copied) / 1e3),
        flops_per_second=2 * side**3 / (product_ms(device, side) / 1e3),
    )


def copy_ms(device: torch.device, elements: int) -> float:
    """The least of three: a copy in a CUDA graph is a node of its own kind, which moved 2.43 TB/s
    on an H100 where a copy from Python moves 3.02."""
    source = torch.empty(elements, device=device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    def negate() -> object:
        return torch.neg(source, out=target)

    return min(device_ms(copy, device), eager_ms(copy, device), device_ms(negate, device))


def product_ms(device: torch.device, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return device_ms(lambda: a @ b, device)
