"""The gated linear units as two Triton kernels (kernels.py). Kept for the backward pass: the packed
projection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmtrain_kernels.direct import direct
from llmtrain_kernels.launch import launch


def rows_of(x: Tensor) -> Tensor:
    """[X, width] with neighbouring elements; a view unless the layout forbids it."""
    x_XF = x.reshape(-1, x.shape[-1])
    return x_XF if x_XF.stride(1) == 1 else x_XF.contiguous()


def grid(rows: int, hidden: int, config: Mapping[str, int]) -> tuple[int]:
    return (-(-rows // config["rows"]) * -(-hidden // config["block"]),)


def options(config: Mapping[str, int]) -> dict[str, int]:
    """What a kernel is compiled for; rows and block are powers of two."""
    return {
        "ROWS": config["rows"],
        "BLOCK": config["block"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }


def run_forward(
    gate_up_X2F: Tensor, activation: str, config: Mapping[str, int] | None = None
) -> Tensor:
    """y_XF. config: of the launch; None for the pinned one, chosen by F."""
    from llmtrain_kernels.glu.kernels import glu_fwd_kernel

    hidden = gate_up_X2F.shape[-1] // 2
    y_XF = gate_up_X2F.new_empty(*gate_up_X2F.shape[:-1], hidden)
    if y_XF.numel() == 0:
        return y_XF
    config = config or launch("glu_fwd", gate_up_X2F.device, hidden)
    packed_X2F = rows_of(gate_up_X2F)
    rows = packed_X2F.shape[0]
    with torch.cuda.device_of(packed_X2F):
        glu_fwd_kernel[grid(rows, hidden, config)](
            packed_X2F,
            y_XF,
            rows,
            packed_X2F.stride(0),
            F=hidden,
            ACTIVATION=activation,
            **options(config),
        )
    return y_XF


def run_backward(
    dy_XF: Tensor, gate_up_X2F: Tensor, activation: str, config: Mapping[str, int] | None = None
) -> Tensor:
    """The gradient of gate_up_X2F, packed alike and contiguous."""
    from llmtrain_kernels.glu.kernels import glu_bwd_kernel

    hidden = dy_XF.shape[-1]
    dgate_up_X2F = gate_up_X2F.new_empty(gate_up_X2F.shape)
    if dgate_up_X2F.numel() == 0:
        return dgate_up_X2F
    config = config or launch("glu_bwd", dy_XF.device, hidden)
    given_XF, packed_X2F = rows_of(dy_XF), rows_of(gate_up_X2F)
    rows = packed_X2F.shape[0]
    with torch.cuda.device_of(packed_X2F):
        glu_bwd_kernel[grid(rows, hidden, config)](
            given_XF,
            packed_X2F,
            dgate_up_X2F,
            rows,
            given_XF.stride(0),
            packed_X2F.stride(0),
            F=hidden,
            ACTIVATION=activation,
            **options(config),
        )
    return dgate_up_X2F


@torch.library.custom_op("llmtrain::glu_forward", mutates_args=())
def forward(gate_up_X2F: Tensor, activation: str) -> Tensor:
    return run_forward(gate_up_X2F, activation)


@forward.register_fake
def _(gate_up_X2F, activation):
    return gate_up_X2F.new_empty(*gate_up_X2F.shape[:-1], gate_up_X2F.shape[-1] // 2)


@torch.library.custom_op("llmtrain::glu_backward", mutates_args=())
def backward(dy_XF: Tensor, gate_up_X2F: Tensor, activation: str) -> Tensor:
    return run_backward(dy_XF, gate_up_X2F, activation)


@backward.register_fake
def _(dy_XF, gate_up_X2F, activation):
    return gate_up_X2F.new_empty(gate_up_X2F.shape)


def setup_context(ctx, inputs, output) -> None:
    gate_up_X2F, ctx.activation = inputs
    ctx.save_for_backward(gate_up_X2F)


def gradients(take: Callable[..., Tensor], ctx, dy_XF):
    """take: what has backward()'s arguments."""
    return take(dy_XF, *ctx.saved_tensors, ctx.activation), None


forward.register_autograd(functools.partial(gradients, backward), setup_context=setup_context)
call = direct(forward, run_forward, setup_context, functools.partial(gradients, run_backward))


def fused(gate_up_X2F: Tensor, *, activation: str = "silu") -> Tensor:
    """y_XF. Arguments as glu()."""
    return call(gate_up_X2F, activation)
