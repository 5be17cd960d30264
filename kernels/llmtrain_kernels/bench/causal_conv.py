"""The causal convolution with SiLU, four taps: dense, packed, and out of a wider projection.

Weights are float32 beside bfloat16 inputs, as in the models, but bfloat16 numbers, so that peers
that want x's dtype lose nothing when they are cast. Packed: documents end with rows, and peers get
the rows as one of B T tokens, which is only another view of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.causal_conv import causal_conv, cost, reference
from llmtrain_kernels.causal_conv.fused import launch_backward, launch_forward, launch_sums

WINDOW = 4
MEAN_DOCUMENT = 512
# of the projection that Mamba-2 of width 2048 slices: gate, convolved, time steps
BEFORE, AFTER = 4096, 64


def cases(quick: bool) -> list[Case]:
    """The shapes of Mamba-2 at width 2048 and of a wide mixer; tiny ones if quick."""
    shapes = [(2, 19, 24)] if quick else [(4, 4096, 4352), (4, 4096, 8192)]
    made = [case(*shape) for shape in shapes]
    return [*made, case(*shapes[0], packed=True), case(*shapes[0], sliced=True)]


def case(
    batch: int, tokens: int, width: int, *, packed: bool = False, sliced: bool = False
) -> Case:
    peers = {"fla": fla_packed} if packed else {"fla": fla, "causal-conv1d": dao, "compile": torchs}
    note = f" documents of {MEAN_DOCUMENT}" if packed else " of a wider projection" * sliced
    return Case(
        kernel="causal_conv",
        shape=f"B{batch} T{tokens} D{width} W{WINDOW}{note}",
        make=functools.partial(make, batch, tokens, width, packed, sliced),
        ours=ours,
        reference=exact,
        costs=cost(batch * tokens, width=width, window=WINDOW, dtype=torch.bfloat16),
        peers=peers,
    )


def make(
    batch: int,
    tokens: int,
    width: int,
    packed: bool,
    sliced: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return drawn.to(dtype)

    columns = (BEFORE, width, AFTER) if sliced else (0, width, 0)
    x_BTD = noise(batch, tokens, sum(columns)).split(columns, dim=-1)[1]
    weight_DW = noise(width, WINDOW).float() / 2
    given = {"x_BTD": x_BTD.requires_grad_(), "weight_DW": weight_DW.requires_grad_()}
    if packed:
        draw_BT = torch.rand(batch, tokens, generator=generator, device=device)
        starts_BT = draw_BT < 1 / min(MEAN_DOCUMENT, tokens)
        starts_BT[:, 0] = True
        starts = starts_BT.flatten().nonzero().flatten()
        given["doc_ids_BT"] = starts_BT.cumsum(dim=1, dtype=torch.int32)
        given["cu_seqlens"] = F.pad(starts, (0, 1), value=batch * tokens)
    return given


def ours(
    x_BTD: Tensor,
    weight_DW: Tensor,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return causal_conv(x_BTD, weight_DW, doc_ids_BT=doc_ids_BT)[0]


def exact(
    x_BTD: Tensor,
    weight_DW: Tensor,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    return reference(x_BTD, weight_DW, doc_ids_BT=doc_ids_BT)[0]


def fla() -> Call:
    from fla.modules.causal_conv1d import causal_conv1d  # type: ignore[import-not-found]

    return lambda x_BTD, weight_DW: causal_conv1d(x_BTD, weight_DW, activation="silu")[0]


def fla_packed() -> Call:
    from fla.modules.causal_conv1d import causal_conv1d  # type: ignore[import-not-found]

    def call(x_BTD: Tensor, weight_DW: Tensor, doc_ids_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
        x_1ND = x_BTD.flatten(0, 1)[None]
        y_1ND, _ = causal_conv1d(x_1ND, weight_DW, activation="silu", cu_seqlens=cu_seqlens)
        return y_1ND.view_as(x_BTD)

    return call


def dao() -> Call:
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

    def call(x_BTD: Tensor, weight_DW: Tensor) -> Tensor:
        return causal_conv1d_fn(x_BTD.mT, weight_DW.to(x_BTD.dtype), activation="silu").mT

    return call


def torchs() -> Call:
    """What one writes in torch, compiled."""

    def call(x_BTD: Tensor, weight_DW: Tensor) -> Tensor:
        width, window = weight_DW.shape
        weight_D1W = weight_DW.to(x_BTD.dtype)[:, None]
        y_BDT = F.conv1d(x_BTD.mT, weight_D1W, padding=window - 1, groups=width)
        return F.silu(y_BDT[..., : x_BTD.shape[1]]).mT

    return torch.compile(call)


# of the sums while spans are measured, as a device without a table would take the default's, which
# takes longer the more spans there are: the fastest on an H100
SUMS = {"block_n": 64, "block_d": 32, "num_warps": 4}
SPANS = 76  # of 2640 programs at B4 D4352
KEYS = ("block_d", "rows", "num_warps", "num_stages", "maxnreg", "programs")


def candidates() -> dict[str, list[dict[str, int]]]:
    """What kernels/bench/tune.py measures. Most are of one warp: with 128 registers 16 of them
    fit on one of 132 processors, with 96 20, with 80 24, with 64 32. Backward, where every span
    writes a row of sums, up to 2640 programs run all at once; with stages loads go through shared
    memory. Forward, the last of a shape has spans of 16 to 32 tokens, so that the end, when
    processors run out of programs, is short."""
    forward = [(256, 8, 1, 1, 128, programs) for programs in (2112, 8448, 16896, 33792)]
    forward += [(256, 4, 1, 1, 96, programs) for programs in (8448, 16896, 33792)]
    forward += [
        (*shape, programs)
        for shape in ((128, 8, 1, 1, 80), (128, 8, 1, 1, 64))
        for programs in (16896, 25344, 43520)
    ]
    forward += [(128, 16, 1, 1, 96, programs) for programs in (8448, 16896, 43520)]
    forward += [(512, 8, 2, 1, 128, programs) for programs in (8448, 16896)]
    backward = [(128, 4, 1, 3, 96, programs) for programs in (1452, 2640, 5280, 9504)]
    backward += [(128, 4, 1, 4, 96, programs) for programs in (1452, 2640)]
    backward += [(128, 8, 1, 3, 128, programs) for programs in (1452, 2112, 4224)]
    backward += [(128, 8, 1, 1, 128, programs) for programs in (2112, 8448)]
    backward += [(128, 4, 1, 1, 96, programs) for programs in (2640, 9504)]
    backward += [(128, 8, 1, 2, 128, 2112), (128, 4, 1, 2, 96, 2640)]
    sums = [
        {"block_n": rows, "block_d": block, "num_warps": 4}
        for rows, block in itertools.product((32, 64, 128), (16, 32, 64))
    ]
    return {
        "causal_conv_fwd": [dict(zip(KEYS, values)) for values in forward],
        "causal_conv_bwd": [dict(zip(KEYS, values)) for values in backward],
        "causal_conv_bwd_sum": sums,
    }


def tunings(
    device: torch.device,
) -> Iterator[tuple[str, int, Callable[[dict[str, int] | None], object]]]:
    """(kernel, size, a call with a configuration): a small and two large shapes. The backward
    call includes the second reduction, whose length its configuration decides."""
    for batch, tokens, width in ((1, 1024, 2048), (4, 4096, 4352), (4, 4096, 8192)):
        x_BTD = torch.randn(batch, tokens, width, device=device).bfloat16()
        dy_BTD = torch.randn_like(x_BTD)
        weight_DW = torch.randn(width, WINDOW, device=device)
        given = (x_BTD, weight_DW, None, None, None, True)
        yield "causal_conv_fwd", x_BTD.numel(), functools.partial(run_forward, given)
        yield "causal_conv_bwd", x_BTD.numel(), functools.partial(run_backward, dy_BTD, given)
    sums_NWD = torch.randn(SPANS, WINDOW + 1, 4352, device=device)
    dweight_DW = torch.empty(4352, WINDOW, device=device)
    yield "causal_conv_bwd_sum", SPANS, functools.partial(run_sums, sums_NWD, dweight_DW)


def run_forward(given: tuple, config: dict[str, int] | None) -> object:
    return launch_forward(*given, False, config=config)


def run_backward(dy_BTD: Tensor, given: tuple, config: dict[str, int] | None) -> object:
    return launch_backward(dy_BTD, None, *given, config=config, sum_config=SUMS)


def run_sums(sums_NWD: Tensor, dweight_DW: Tensor, config: dict[str, int] | None) -> object:
    return launch_sums(sums_NWD, dweight_DW, None, config=config)
