"""One kernel at one shape, as the benchmark sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain_kernels.cost import Cost

# inputs in, outputs out: a tensor or a tuple of them. What needs no gradient is no output.
Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """kernel, shape: names for the tables. make(device, dtype) -> inputs by name; those of a
    floating dtype that require gradients are differentiated. ours: the public function.
    reference: the same in the inputs' dtype, which is float64 when errors are taken.
    peers: name -> a function that imports the peer and returns its call (ImportError: reported as
    absent); all take the same inputs, by name, and give the same outputs.
    costs: (forward, backward). backward: False for a kernel without. error: the relative error that
    it may have; None: what its dtype allows.
    """

    kernel: str
    shape: str
    make: Callable[[torch.device, torch.dtype], dict[str, Tensor]]
    ours: Call
    reference: Call
    costs: tuple[Cost, Cost]
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    backward: bool = True
    error: float | None = None
