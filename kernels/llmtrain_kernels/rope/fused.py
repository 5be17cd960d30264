"""Rotary embedding as one Triton kernel (kernels.py), forward and backward. Kept for the backward
pass: the angles, which all layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from operator import index

import torch
from torch import Tensor

from llmtrain_kernels.direct import direct
from llmtrain_kernels.launch import launch

MOST_ROWS = 65535  # what a grid's second axis has


def in_rows(x_BTHK: Tensor) -> Tensor:
    """With neighbouring elements in a head; a copy only if they are not."""
    return x_BTHK if x_BTHK.stride(-1) == 1 else x_BTHK.contiguous()


def run(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    interleaved: bool,
    q_start: int,
    k_start: int,
    inverse: bool,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(q, k) turned, k empty if there is none. config: of the launch; None for the pinned one,
    chosen by R. q_start, k_start: the first dimension that turns. inverse: by the negative
    angles."""
    from llmtrain_kernels.rope.kernels import rope_kernel

    q_out, k_out = outputs(q_BTHK, k_BTGK)
    if q_out.numel() + k_out.numel() == 0:
        return q_out, k_out
    batch, tokens, heads, q_width = q_BTHK.shape
    half = cos_BTR.shape[2]
    config = config or launch("rope", q_BTHK.device, half)
    q_BTHK = in_rows(q_BTHK)
    k_BTGK = q_BTHK[:, :, :0] if k_BTGK is None else in_rows(k_BTGK)
    groups, k_width = k_BTGK.shape[2:]
    cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
    rows, pairs = config["rows"], tokens * (heads + groups)
    assert batch <= MOST_ROWS
    assert pairs + rows < 2**31
    with torch.cuda.device_of(q_BTHK):
        rope_kernel[(-(-pairs // rows), batch)](
            q_BTHK,
            k_BTGK,
            cos_BTR,
            sin_BTR,
            q_out,
            k_out,
            tokens,
            *q_BTHK.stride()[:3],
            *k_BTGK.stride()[:3],
            tokens * half if cos_BTR.shape[0] > 1 else 0,
            H=heads,
            G=groups,
            Q_WIDTH=q_width,
            K_WIDTH=k_width,
            Q_START=q_start,
            K_START=k_start,
            R=half,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            ROWS=rows,
            num_warps=config["num_warps"],
        )
    return q_out, k_out


def outputs(q_BTHK: Tensor, k_BTGK: Tensor | None) -> tuple[Tensor, Tensor]:
    k_shape = (0,) if k_BTGK is None else k_BTGK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty(k_shape)


@torch.library.custom_op("llmtrain::rope_turn", mutates_args=())
def turned(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    interleaved: bool,
    q_start: int,
    k_start: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return run(q_BTHK, k_BTGK, cos_BTR, sin_BTR, interleaved, q_start, k_start, inverse)


@turned.register_fake
def _(q_BTHK, k_BTGK, cos_BTR, sin_BTR, interleaved, q_start, k_start, inverse):
    return outputs(q_BTHK, k_BTGK)


def setup_context(ctx, inputs, output) -> None:
    _, k_BTGK, cos_BTR, sin_BTR, *ctx.options = inputs
    ctx.has_keys = k_BTGK is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos_BTR, sin_BTR)


def turned_back(turn: Callable[..., tuple[Tensor, Tensor]], ctx, dq_BTHK, dk_BTGK):
    """The gradients of q and k in one launch; angles have none. turn: what takes turned()'s
    arguments."""
    interleaved, q_start, k_start, inverse = ctx.options
    angles = *ctx.saved_tensors, interleaved
    if not ctx.has_keys:
        dk_BTGK = None
    if dq_BTHK is not None and dk_BTGK is not None:
        dq_BTHK, dk_BTGK = turn(dq_BTHK, dk_BTGK, *angles, q_start, k_start, not inverse)
    elif dq_BTHK is not None:
        dq_BTHK, _ = turn(dq_BTHK, None, *angles, q_start, 0, not inverse)
    elif dk_BTGK is not None:
        dk_BTGK, _ = turn(dk_BTGK, None, *angles, k_start, 0, not inverse)
    return dq_BTHK, dk_BTGK, None, None, None, None, None, None


turned.register_autograd(functools.partial(turned_back, turned), setup_context=setup_context)


def gradients(ctx, *of_outputs):
    return turned_back(turn, ctx, *of_outputs)


turn = direct(turned, run, setup_context, gradients, twice=True)


def fused(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    *,
    interleaved: bool = False,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(q, k), turned. Arguments as rope()."""
    q_start, k_start = (
        0 if part is None or x is None else index(x.shape[-1]) - part for x in (q_BTHK, k_BTGK)
    )
    how = (interleaved, q_start, k_start, False)
    q_out, k_out = turn(q_BTHK, k_BTGK, cos_BTR, sin_BTR, *how)
    return q_out, None if k_BTGK is None else k_out
