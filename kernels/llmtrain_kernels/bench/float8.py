"""The float8 linear layer beside the bfloat16 one, at the widths of an 8B model.

The weight is quantised before, as the trainer does once a step. "products alone" has all factors
quantised before: what the three products take, and the least that quantising could leave. The floor
is that of bfloat16 products, so what is faster than them has more than 100 % of it. Errors are
against the product of the unrounded factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.float8 import (
    E4M3,
    E5M2,
    Quantised,
    QuantisedWeight,
    both_layouts,
    cost,
    float8_linear,
    product,
    quantise_weight,
)
from llmtrain_kernels.float8.quantise import largest_of, launch_cast

SHAPES = [(16384, 4096, 4096), (16384, 4096, 28672), (16384, 14336, 4096)]  # tokens, in, out
QUICK = [(32, 16, 48)]
ERROR = 0.1  # a product of e5m2 and e4m3 is 6e-2 off


def make(
    tokens: int, d_in: int, d_out: int
) -> Callable[[torch.device, torch.dtype], dict[str, Tensor]]:
    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(tokens, d_in, generator=generator, device=device)
        weight = torch.randn(d_out, d_in, generator=generator, device=device) * d_in**-0.5
        return {"x": x.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}

    return inputs


def backend_of(x: Tensor) -> str:
    return "scaled_mm" if x.is_cuda else "emulated"


@dataclass
class Ours:
    """float8_linear() with a weight that is quantised at the first call."""

    made: list[QuantisedWeight] = field(default_factory=list)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.made:
            self.made.append(quantise_weight(weight.detach(), "tensorwise"))
        return float8_linear(x, weight, quantised=self.made[0], backend=backend_of(x))


class Products(torch.autograd.Function):
    """The three products of factors that were quantised before, dy's among them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, kept: Mapping[str, tuple[Quantised, Quantised]]
    ) -> Tensor:
        ctx.kept, ctx.dtype, ctx.backend = kept, x.dtype, backend_of(x)
        factors = kept["x"][0], kept["weight"][0]
        return product(*factors, ctx.dtype, ctx.backend)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (_, x), (_, weight), (dy_rows, dy_columns) = (ctx.kept[k] for k in ("x", "weight", "dy"))
        dx = product(dy_rows, weight, ctx.dtype, ctx.backend)
        return dx, product(dy_columns, x, ctx.dtype, ctx.backend), None


def products_alone() -> Call:
    kept: dict[str, tuple[Quantised, Quantised]] = {}

    def call(x: Tensor, weight: Tensor) -> Tensor:
        if not kept:
            generator = torch.Generator(x.device).manual_seed(1)  # dy as the harness makes it
            dy = x.new_empty(len(x), len(weight)).normal_(generator=generator)
            kept["x"] = both_layouts(x.detach(), E4M3, "tensorwise")
            kept["weight"] = both_layouts(weight.detach(), E4M3, "tensorwise")
            kept["dy"] = both_layouts(dy, E5M2, "tensorwise")
        return Products.apply(x, weight, kept)

    return call


def cases(quick: bool) -> list[Case]:
    return [
        Case(
            kernel="float8_linear",
            shape=f"N{tokens} D{d_in} F{d_out}",
            make=make(tokens, d_in, d_out),
            ours=Ours(),
            reference=lambda x, weight: F.linear(x, weight),
            costs=cost(tokens, d_in, d_out, itemsize=4 if quick else 2),
            peers={
                "bfloat16": lambda: lambda x, weight: F.linear(x, weight),
                "products alone": products_alone,
            },
            error=ERROR,
        )
        for tokens, d_in, d_out in (QUICK if quick else SHAPES)
    ]


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches for the tuner: tiles of 4096 to 16384 numbers, 32 or more a side."""
    tiles = [(64, 128, 8), (64, 64, 4), (128, 64, 8), (128, 64, 4), (64, 128, 4), (128, 128, 8)]
    tiles += [(32, 128, 4), (128, 32, 4), (64, 64, 8), (256, 32, 8), (32, 256, 8)]
    return {"float8_cast": [dict(zip(("rows", "columns", "num_warps"), t)) for t in tiles]}


def tunings(
    device: torch.device,
) -> list[tuple[str, int, Callable[[Mapping[str, int]], object]]]:
    """(kernel, size as launch() has it, what runs it with a candidate)."""
    x = torch.randn(16384, 4096, device=device, dtype=torch.bfloat16)
    amax = largest_of(x)
    made = [torch.empty(shape, device=device, dtype=E4M3) for shape in (x.shape, x.t().shape)]
    return [("float8_cast", x.numel(), lambda config: launch_cast(x, amax, *made, config))]
