"""Norms beside their peers: alone, of a sum with the residual, and gated.

Gains and offsets are float32, as parameters are, for all; what torch.compile gets casts them to the
activations' dtype, as torch's own norms ask. The gated ones are of Mamba-2 (the gate first, all of
a row) and of gated DeltaNet (16 heads of 128, the gate last).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels import norm
from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.norm import fused, reference

EPS = 1e-6
ROWS = 16384
SHAPES = [
    ("rms_norm", (ROWS, 2048)),
    ("rms_norm", (ROWS, 4096)),
    ("add_rms_norm", (ROWS, 4096)),
    ("layer_norm", (ROWS, 4096)),
    ("gated_rms_norm", (ROWS, 4096)),
    ("gated_rms_norm", (ROWS, 16, 128)),
]
QUICK = [(name, (6, *shape[1:-1], 24)) for name, shape in SHAPES]
WHAT = {
    "rms_norm": {},
    "add_rms_norm": {"residual": True},
    "layer_norm": {"bias": True, "centered": True},
    "gated_rms_norm": {"gate": True},
}


def make(
    name: str, shape: tuple[int, ...]
) -> Callable[[torch.device, torch.dtype], dict[str, Tensor]]:
    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device)

        made = {"x": noise(*shape).to(dtype)}
        made |= {key: noise(*shape).to(dtype) for key in ("residual", "gate") if key in WHAT[name]}
        made["weight"] = 1 + 0.1 * noise(shape[-1])
        if "bias" in WHAT[name]:
            made["bias"] = 0.1 * noise(shape[-1])
        return {key: z.requires_grad_() for key, z in made.items()}

    return inputs


def compiled(name: str, before: bool) -> Call:
    """What torch.compile makes of the plain formula."""

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return rms_norm(h, weight), h

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)

    def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        opened = F.silu(gate.float())
        if before:
            return (F.rms_norm(x.float(), weight.shape, weight, EPS) * opened).to(x.dtype)
        return F.rms_norm(x.float() * opened, weight.shape, weight, EPS).to(x.dtype)

    plain = (rms_norm, add_rms_norm, layer_norm, gated_rms_norm)
    return torch.compile(next(f for f in plain if f.__name__ == name), dynamic=False)


def liger(name: str) -> Call:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, weight, bias, EPS)

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "layer_norm": layer_norm}[name]


def fla(name: str, before: bool) -> Call:
    from fla.modules import fused_norm_gate, layernorm, layernorm_gated

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return layernorm.rms_norm(x, weight, None, eps=EPS)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return layernorm.rms_norm(x, weight, None, residual=residual, eps=EPS, prenorm=True)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layernorm.layer_norm(x, weight, bias, eps=EPS)

    def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        if before:
            return fused_norm_gate.rms_norm_gated(x, gate, weight, None, eps=EPS)
        options = {"eps": EPS, "norm_before_gate": False}
        return layernorm_gated.rmsnorm_fn(x, weight, None, z=gate, **options)

    made = (rms_norm, add_rms_norm, layer_norm, gated_rms_norm)
    return next(f for f in made if f.__name__ == name)


def quack(name: str) -> Call:
    from quack import rmsnorm

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return rmsnorm(x, weight, eps=EPS)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}[name]


def cases(quick: bool) -> list[Case]:
    made = []
    for name, shape in QUICK if quick else SHAPES:
        before = len(shape) == 3
        peers = {
            "torch.compile": partial(compiled, name, before),
            "fla": partial(fla, name, before),
        }
        if name != "gated_rms_norm":
            peers["liger"] = partial(liger, name)
        if name in ("rms_norm", "add_rms_norm"):
            peers["quack"] = partial(quack, name)
        options = {"eps": EPS} | ({"norm_before_gate": before} if "gate" in WHAT[name] else {})
        dtype = torch.float32 if quick else torch.bfloat16
        width, rows = shape[-1], torch.Size(shape[:-1]).numel()
        case = Case(
            kernel=name,
            shape="x".join(map(str, shape)),
            make=make(name, shape),
            ours=partial(getattr(norm, name), **options),
            reference=partial(getattr(reference, name), **options),
            costs=norm.cost(rows, width, dtype=dtype, **WHAT[name]),
            peers=peers,
        )
        made.append(case)
    return made


# (rows, programs, warps, stages), for rows of 128, of 512, and of 2048 and more. Two stages would
# be as one: the next tile is asked for at a step's end, and waited for at the next one's start.
FORWARD = [(16, 6, 4, 4), (32, 4, 8, 3), (32, 0, 4, 1), (16, 0, 4, 1)]
FORWARD += [(8, 6, 4, 3), (8, 0, 4, 1), (4, 4, 8, 3), (2, 0, 4, 1)]
FORWARD += [(2, 4, 8, 3), (1, 4, 8, 3), (1, 4, 8, 4), (1, 2, 16, 3), (1, 2, 16, 4), (1, 1, 32, 3)]
FORWARD += [(1, 0, 4, 1), (1, 0, 8, 1), (2, 0, 8, 1), (1, 0, 16, 1), (2, 0, 16, 1), (1, 0, 32, 1)]
BACKWARD = [(16, 6, 4, 3), (16, 5, 4, 3), (16, 4, 4, 3), (16, 4, 4, 4), (32, 4, 8, 3)]
BACKWARD += [(16, 6, 4, 1), (8, 6, 4, 3), (8, 6, 4, 4)]
BACKWARD += [(4, 4, 4, 3), (2, 6, 4, 3), (8, 4, 8, 3)]
BACKWARD += [(1, 2, 8, 3), (1, 2, 8, 4), (1, 2, 8, 5), (1, 4, 8, 3), (1, 4, 8, 4), (2, 2, 8, 3)]
BACKWARD += [(1, 1, 16, 3), (1, 1, 16, 4), (1, 1, 16, 5), (1, 2, 16, 3), (1, 2, 16, 4)]
BACKWARD += [(1, 1, 32, 2), (1, 1, 32, 1), (1, 2, 16, 1)]
SUMS = [(512, 16, 8), (256, 32, 8), (256, 16, 4), (128, 64, 8), (128, 32, 4), (64, 64, 4)]


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches for the tuner, for rows of any width: those that do not suit one, raise there."""
    keys = ("rows", "programs", "num_warps", "num_stages")
    forward, backward = ([dict(zip(keys, c)) for c in made] for made in (FORWARD, BACKWARD))
    made = {"norm_sum": [dict(zip(("rows", "block", "num_warps"), c)) for c in SUMS]}
    for kind in ("norm", "layer_norm", "add_norm", "gated_norm"):
        made |= {f"{kind}_fwd": forward, f"{kind}_bwd": backward}
    return made


def tunings(
    device: torch.device,
) -> list[tuple[str, int, Callable[[Mapping[str, int]], object]]]:
    """(kernel, size as launch() has it, what runs it with a candidate)."""
    found = []
    widths = {
        "norm": (128, 512, 1024, 2048, 4096, 8192, 16384),
        "layer_norm": (1024, 2048, 4096, 16384),
        "add_norm": (512, 1024, 2048, 4096, 8192, 16384),
        "gated_norm": (64, 128, 256, 1024, 4096, 8192, 16384),
    }
    for kind, sizes in widths.items():
        for width in sizes:
            rows = min(2**26 // width, 2**18)
            run = runner(kind, rows, width, device)
            found += [(f"{kind}_fwd", width, run[0]), (f"{kind}_bwd", width, run[1])]
    sums = torch.empty(264, 1, 4096, device=device), torch.empty(4096, device=device)
    return [*found, ("norm_sum", 4096, lambda config: fused.add_partials(*sums, None, config))]


def runner(
    kind: str, rows: int, width: int, device: torch.device
) -> tuple[Callable[[Mapping[str, int]], object], Callable[[Mapping[str, int]], object]]:
    """Forward and backward of a kind; what they read is made when the first of them runs."""
    added, gated, centered = (kind == name for name in ("add_norm", "gated_norm", "layer_norm"))
    options = (width, centered, False, gated and width > 128, False)
    made: list[Tensor] = []

    def tensors() -> list[Tensor]:
        if not made:
            shape = (3, rows, width)
            made.extend(torch.randn(shape, device=device, dtype=torch.bfloat16).unbind())
            made.extend([torch.ones(width, device=device), torch.ones(rows, 1, device=device)])
        return made

    def forward(config: Mapping[str, int]) -> object:
        check(width, config)
        x, other, _, weight, _ = tensors()
        bias = weight if centered else None
        given = (x, other if added else None, other if gated else None, weight, bias)
        return fused.launch_forward(*given, EPS, *options, True, config)

    def backward(config: Mapping[str, int]) -> object:
        check(width, config)
        x, other, dy, weight, rstd = tensors()
        bias = weight if centered else None
        saved = (x, other if gated else None, weight, bias, rstd, rstd)
        return fused.launch_backward(dy, other if added else None, *saved, *options, added, config)

    return forward, backward


def check(width: int, config: Mapping[str, int]) -> None:
    """ValueError for a tile that leaves a thread with less than 8 numbers or more than 32."""
    each = config["rows"] * fused.tile(width, config)["BLOCK"] // (32 * config["num_warps"])
    if not 8 <= each <= 32:
        raise ValueError(f"{each} numbers a thread")
