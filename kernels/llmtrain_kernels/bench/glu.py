"""Gated linear units on a packed projection beside their peers.

All peers get the packed projection, as a linear layer gives it, and return its gradient. What takes
halves gets views of it: their gradients are then put together by autograd, which is part of the
price. liger and fla take no copies of the halves in this layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.glu import cost, glu, reference
from llmtrain_kernels.glu.fused import run_backward, run_forward

SHAPES = [(16384, 5632, "silu"), (16384, 14336, "silu"), (16384, 5632, "gelu")]
QUICK = [(6, 20, "silu"), (6, 20, "gelu")]
NAMES = {"silu": "swiglu", "gelu": "geglu"}


def make(rows: int, hidden: int) -> Callable[[torch.device, torch.dtype], dict[str, Tensor]]:
    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        gate_up = torch.randn(rows, 2 * hidden, generator=generator, device=device)
        return {"gate_up": gate_up.to(dtype).requires_grad_()}

    return inputs


def compiled(activation: str) -> Callable[[], Call]:
    """What torch.compile makes of the plain formula."""

    def load() -> Call:
        act = F.silu if activation == "silu" else F.gelu

        def plain(gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return act(gate) * up

        return torch.compile(plain)

    return load


def liger() -> Call:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def fla() -> Call:
    from fla.modules.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.chunk(2, dim=-1))


def cases(quick: bool) -> list[Case]:
    made = []
    for rows, hidden, activation in QUICK if quick else SHAPES:
        peers = {"torch.compile": compiled(activation)}
        if activation == "silu":
            peers |= {"liger": liger, "fla": fla}

        def ours(gate_up: Tensor, activation: str = activation) -> Tensor:
            return glu(gate_up, activation=activation)

        def exact(gate_up: Tensor, activation: str = activation) -> Tensor:
            return reference(gate_up, activation=activation)

        case = Case(
            kernel=NAMES[activation],
            shape=f"{rows}x{hidden}",
            make=make(rows, hidden),
            ours=ours,
            reference=exact,
            costs=cost(rows, hidden=hidden, dtype=torch.float32 if quick else torch.bfloat16),
            peers=peers,
        )
        made.append(case)
    return made


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches for the tuner: 8 to 32 results a thread."""
    tiles = [(1, 512, 2), (1, 1024, 4), (2, 512, 4), (1, 2048, 8), (4, 512, 8), (2, 1024, 8)]
    tiles += [(1, 1024, 2), (2, 512, 2), (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (1, 4096, 8)]
    keys = ("rows", "block", "num_warps")
    configs = [dict(zip(keys, tile, strict=True), num_stages=1) for tile in tiles]
    return {"glu_fwd": configs, "glu_bwd": configs}


def tunings(
    device: torch.device,
) -> list[tuple[str, int, Callable[[Mapping[str, int]], object]]]:
    """(kernel, size as launch() has it, what runs it with a candidate)."""
    found = []
    for rows, hidden in ((16384, 2816), (16384, 5632), (16384, 14336)):
        gate_up = torch.randn(rows, 2 * hidden, device=device, dtype=torch.bfloat16)
        dy = torch.randn(rows, hidden, device=device, dtype=torch.bfloat16)

        def forward(config: Mapping[str, int], x: Tensor = gate_up) -> object:
            return run_forward(x, "silu", config)

        def backward(config: Mapping[str, int], x: Tensor = gate_up, dy: Tensor = dy) -> object:
            return run_backward(dy, x, "silu", config)

        found += [("glu_fwd", hidden, forward), ("glu_bwd", hidden, backward)]
    return found
