"""The head projection with its cross entropy, beside its peers.

The weight is bfloat16 as the peers want it, and then ours adds its gradient up in it, as liger
does: any copy in float32 is larger than the 300 MiB that the operation may take. "float32 weight"
is what the trainer has: all cast it, and the gradient is added up in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.linear_cross_entropy import cost, linear_cross_entropy
from llmtrain_kernels.linear_cross_entropy.chunked import rows_by_triton, scale_by_triton
from llmtrain_kernels.linear_cross_entropy.chunks import row_stride, rows_per_chunk

SHAPES = [(8192, 2048, 32000), (16384, 2048, 128256), (8192, 4096, 128256)]  # N, D, O
QUICK = [(48, 32, 130)]
FWD, BWD = "linear_cross_entropy_fwd", "linear_cross_entropy_bwd"


def cases(quick: bool) -> list[Case]:
    return [case(*shape, wide) for shape in (QUICK if quick else SHAPES) for wide in (False, True)]


def case(rows: int, width: int, columns: int, wide: bool) -> Case:
    """wide: the weight is float32 whatever the dtype of the rest."""

    def weight_dtype(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if wide else dtype

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": generator}
        x_ND = torch.randn(rows, width, **options).to(dtype)
        weight_OD = (0.02 * torch.randn(columns, width, **options)).to(dtype)
        return {
            "x": x_ND.requires_grad_(),
            "weight": weight_OD.to(weight_dtype(dtype)).requires_grad_(),
            "targets": torch.randint(columns, (rows,), **options),
        }

    bf16 = torch.bfloat16
    return Case(
        kernel="linear_cross_entropy",
        shape=f"N{rows} D{width} V{columns}" + (" float32 weight" if wide else ""),
        make=make,
        ours=functools.partial(ours, wide_sum=wide),
        reference=formula_in_chunks,
        peers={
            "torch.compile": lambda: torch.compile(formula, dynamic=False),
            "liger": liger,
            "cut_cross_entropy": cut_cross_entropy,
            "quack": quack,
        },
        costs=cost(rows, width=width, columns=columns, dtype=bf16, weight_dtype=weight_dtype(bf16)),
    )


def ours(x: Tensor, weight: Tensor, targets: Tensor, *, wide_sum: bool) -> Tensor:
    return linear_cross_entropy(x, weight, targets, wide_sum=wide_sum).loss


def formula(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


def formula_in_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The formula a part of the rows at a time, recomputed: float64 logits of all would not fit."""
    from torch.utils.checkpoint import checkpoint

    parts = [
        checkpoint(formula, part, weight, labels, use_reentrant=False)
        for part, labels in zip(x.split(2048), targets.split(2048), strict=True)
    ]
    return torch.stack(parts).sum()


def liger() -> Call:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        knobs = (None, None, -100, 0.0, 0.0, "sum")
        weight = weight.to(x.dtype)
        return LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, *knobs)[0]

    return call


def cut_cross_entropy() -> Call:
    from cut_cross_entropy import linear_cross_entropy as peer

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # without its filter, which leaves small gradients out
        return peer(x, weight.to(x.dtype), targets, reduction="sum", filter_eps=None, impl="cce")

    return call


def quack() -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(x, weight.to(x.dtype), targets, reduction="sum")

    return call


def candidates() -> dict[str, list[dict[str, int]]]:
    """What the tuner tries: few threads with many elements on their way, and many; whole rows in
    the second-level cache want few programs at once."""
    shapes = [(4, 4), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2)]
    tried = [(*shape, stages) for shape in shapes for stages in (1, 3)]
    forward = [
        {"block": 256 * warps * sub, "num_warps": warps, "stages": stages}
        for warps, sub, stages in [*tried, (16, 4, 2), (32, 2, 2)]
    ]
    backward = [
        {"block": 256 * warps * sub, "num_warps": warps} for warps in (4, 8) for sub in (2, 4, 8)
    ]
    return {FWD: forward, BWD: backward}


def tunings(
    device: torch.device,
) -> Iterator[tuple[str, int, Callable[[dict[str, int] | None], None]]]:
    """(kernel, size, what runs it once with a configuration)."""
    for columns in (8192, 32000, 128256):
        yield FWD, columns, forward_step(device, columns)
    gradient = torch.randn(32000 * 2048, device=device)
    upstream = torch.tensor(-1.0, device=device)
    yield (
        BWD,
        gradient.numel(),
        lambda config: scale_by_triton(gradient, upstream, 1.0, config=config),
    )


def forward_step(device: torch.device, columns: int) -> Callable[[dict[str, int] | None], None]:
    """A chunk of logits. After the first call gradients stand there, which cost as much."""
    rows = rows_per_chunk(16384, columns, 2)
    logits_CS = torch.randn(rows, row_stride(columns), device=device, dtype=torch.bfloat16)
    targets_C = torch.randint(columns, (rows,), device=device)
    sums_2C = torch.empty(2, rows, device=device)

    def run(config: dict[str, int] | None) -> None:
        rows_by_triton(
            logits_CS,
            targets_C,
            None,
            sums_2C,
            z_loss=0.0,
            softcap=None,
            ignore_index=-100,
            vocab_size=columns,
            expected=1.0,
            config=config,
        )

    return run
