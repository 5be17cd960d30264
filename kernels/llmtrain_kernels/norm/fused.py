"""The norms as Triton kernels (kernels.py) in two operators, forward and backward, for all of them.

Saved for the backward pass: x, or h if there was a residual; the gate; the gains; 4 bytes a row
(8 of a layer norm).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmtrain_kernels.direct import direct
from llmtrain_kernels.launch import launch
from llmtrain_kernels.norm.rows import rows_of

WIDEST = 16384  # of a row: a program has it whole
HELD = 8192  # up to this width the backward kernel keeps gains in registers
VECTOR = 8  # numbers a thread has of a row at a time, at most
INTERPRETED_PROCESSORS = 2

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    group_width: int,
    centered: bool,
    zero_centered: bool,
    gate_first: bool,
    sigmoid: bool,
    save: bool,
    config: Mapping[str, int] | None = None,
) -> Outputs:
    """(y, h, mean, reciprocal root); what is not wanted is empty. config: None for the pinned."""
    from llmtrain_kernels.norm.kernels import norm_fwd_kernel

    assert weight.is_contiguous()
    assert bias is None or bias.is_contiguous()
    y, h, mean, rstd = outputs(x, residual, gate, group_width, centered, save)
    (x, residual, gate), rows, inner, strides = rows_of((x, residual, gate))
    assert rows < 2**31
    groups = x.shape[-1] // group_width
    kind = table(residual is not None, gate is not None, centered)
    config = config or launch(f"{kind}_fwd", x.device, group_width)
    with torch.cuda.device_of(x):
        norm_fwd_kernel[grid(x.device, rows, groups, config)](
            x,
            residual,
            gate,
            weight,
            bias,
            y,
            h if residual is not None else None,
            mean if save and centered else None,
            rstd if save else None,
            rows,
            inner,
            eps,
            groups,
            group_width,
            *(stride for pair in strides for stride in pair),
            CENTERED=centered,
            ZERO_CENTERED=zero_centered,
            GATE_FIRST=gate_first,
            SIGMOID=sigmoid,
            SAVE=save,
            HOLD=config["programs"] > 0,
            **tile(group_width, config, x, residual, gate),
        )
    return y, h, mean, rstd


def launch_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    group_width: int,
    centered: bool,
    zero_centered: bool,
    gate_first: bool,
    sigmoid: bool,
    added: bool,
    config: Mapping[str, int] | None = None,
) -> Outputs:
    """(dx, dgate, dweight, dbias); what is not wanted is empty. x: h if there was a residual, and
    then `added` is true. config: None for the pinned."""
    from llmtrain_kernels.norm.kernels import norm_bwd_kernel

    dx, dgate, dweight, dbias = gradients_of(x, gate, weight, bias)
    (dy, dh, x, gate), rows, inner, strides = rows_of((dy, dh, x, gate))
    width, groups = x.shape[-1], x.shape[-1] // group_width
    kind = table(added, gate is not None, centered)
    config = config or launch(f"{kind}_bwd", x.device, group_width)
    programs, _ = size = grid(x.device, rows, groups, config)
    sums = 1 if bias is None else 2
    partial = torch.empty(programs, sums, width, dtype=torch.float32, device=x.device)
    tiled = tile(group_width, config, dy, dh, x, gate)
    with torch.cuda.device_of(x):
        norm_bwd_kernel[size](
            dy,
            dh,
            x,
            gate,
            weight,
            bias,
            mean if centered else None,
            rstd,
            dx,
            dgate if gate is not None else None,
            partial,
            rows,
            inner,
            groups,
            group_width,
            *(stride for pair in strides for stride in pair),
            CENTERED=centered,
            ZERO_CENTERED=zero_centered,
            GATE_FIRST=gate_first,
            SIGMOID=sigmoid,
            **backward_options(tiled),
            **tiled,
        )
    add_partials(partial, dweight, dbias if bias is not None else None)
    return dx, dgate, dweight, dbias


def add_partials(
    partial: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    config: Mapping[str, int] | None = None,
) -> None:
    """Write the sums over the programs, partial [programs, 1 or 2, D], to dweight and dbias [D]."""
    from llmtrain_kernels.norm.kernels import norm_sum_kernel

    programs, sums, width = partial.shape
    config = config or launch("norm_sum", partial.device, width)
    with torch.cuda.device_of(partial):
        norm_sum_kernel[(-(-width // config["block"]), sums)](
            partial,
            dweight,
            dbias,
            programs,
            width,
            ROWS=config["rows"],
            BLOCK=config["block"],
            num_warps=config["num_warps"],
        )


def table(added: bool, gated: bool, centered: bool) -> str:
    """The launch tables' name of a norm."""
    if added or gated:
        return "add_norm" if added else "gated_norm"
    return "layer_norm" if centered else "norm"


def grid(
    device: torch.device, rows: int, groups: int, config: Mapping[str, int]
) -> tuple[int, int]:
    """Programs that walk over the rows, and groups. config["programs"]: of all, on a processor;
    0: one for every tile."""
    tiles = max(1, -(-rows // config["rows"]))
    if config["programs"] == 0:
        return tiles, groups
    most = config["programs"] * processors(device) // groups
    steps = -(-tiles // max(1, most))
    return -(-tiles // steps), groups  # as many tiles for each as can be


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile(group_width: int, config: Mapping[str, int], *read: Tensor | None) -> dict[str, int]:
    """What of a launch the kernels are compiled for. read: tensors whose tiles wait in shared
    memory, a set a stage; where the pinned stages do not fit (wide rows of float32), fewer."""
    block = 1 << (group_width - 1).bit_length()
    given, stages = [z for z in read if z is not None], config["num_stages"]
    if given:
        stage = config["rows"] * block * sum(z.element_size() for z in given)
        stages = max(1, min(stages, shared_bytes(given[0].device) // stage))
    return {
        "ROWS": config["rows"],
        "BLOCK": block,
        "STAGES": stages,
        "num_warps": config["num_warps"],
    }


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """What a program may have of its processor's shared memory, less a KiB for sums."""
    if device.type != "cuda":
        return 2**30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 1024


def backward_options(tiled: dict[str, int]) -> dict[str, bool]:
    """SUM_ROWS where a thread has its columns of all rows of a tile."""
    across = tiled["BLOCK"] >= 32 * VECTOR * tiled["num_warps"]
    return {"SUM_ROWS": across, "HOLD": tiled["BLOCK"] <= HELD}


def outputs(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    group_width: int,
    centered: bool,
    save: bool,
) -> Outputs:
    leading, width = x.shape[:-1], x.shape[-1]
    statistics = (*leading, width // group_width)
    made = {"device": x.device, "dtype": torch.float32}
    return (
        torch.empty(x.shape, device=x.device, dtype=x.dtype if gate is None else gate.dtype),
        torch.empty(0 if residual is None else x.shape, device=x.device, dtype=x.dtype),
        torch.empty(statistics if save and centered else 0, **made),
        torch.empty(statistics if save else 0, **made),
    )


def gradients_of(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None) -> Outputs:
    return (
        torch.empty(x.shape, device=x.device, dtype=x.dtype),
        x.new_empty(0) if gate is None else torch.empty(x.shape, device=x.device, dtype=gate.dtype),
        torch.empty(weight.shape, device=x.device, dtype=weight.dtype),
        x.new_empty(0)
        if bias is None
        else torch.empty(bias.shape, device=x.device, dtype=bias.dtype),
    )


@torch.library.custom_op("llmtrain::norm_forward", mutates_args=())
def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    group_width: int,
    centered: bool,
    zero_centered: bool,
    gate_first: bool,
    sigmoid: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """launch_forward() with what is pinned."""
    options = (group_width, centered, zero_centered, gate_first, sigmoid, save)
    return launch_forward(x, residual, gate, weight, bias, eps, *options)


@forward.register_fake
def _(
    x,
    residual,
    gate,
    weight,
    bias,
    eps,
    group_width,
    centered,
    zero_centered,
    gate_first,
    sigmoid,
    save,
):
    return outputs(x, residual, gate, group_width, centered, save)


@torch.library.custom_op("llmtrain::norm_backward", mutates_args=())
def backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    group_width: int,
    centered: bool,
    zero_centered: bool,
    gate_first: bool,
    sigmoid: bool,
    added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """launch_backward() with what is pinned."""
    saved = (x, gate, weight, bias, mean, rstd)
    options = (group_width, centered, zero_centered, gate_first, sigmoid, added)
    return launch_backward(dy, dh, *saved, *options)


@backward.register_fake
def _(dy, dh, x, gate, weight, bias, *rest):
    return gradients_of(x, gate, weight, bias)


def setup_context(ctx, inputs, output) -> None:
    x, residual, gate, weight, bias, _, *options, _ = inputs
    _, h, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.options, ctx.added = options, residual is not None
    ctx.save_for_backward(h if ctx.added else x, gate, weight, bias, mean, rstd)


def gradients(take: Callable[..., Outputs], ctx, dy, dh, dmean, drstd):
    """Of forward(). Its statistics are for this function only. take: what has backward()'s
    arguments."""
    x, gate, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x if gate is None else gate)
    saved = (x, gate, weight, bias, mean, rstd)
    dh = dh if ctx.added else None  # else h is empty, and so would be its gradient
    dx, dgate, dweight, dbias = take(dy, dh, *saved, *ctx.options, ctx.added)
    optional = (
        dx if ctx.added else None,
        None if gate is None else dgate,
        dweight,
        None if bias is None else dbias,
    )
    return dx, *optional, *(None,) * 7


forward.register_autograd(functools.partial(gradients, backward), setup_context=setup_context)
call = direct(forward, launch_forward, setup_context, functools.partial(gradients, launch_backward))


def normalise(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    group_width: int | None,
    centered: bool,
    zero_centered: bool = False,
    gate_first: bool = False,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, h); h is empty without a residual."""
    leaves = (x, residual, gate, weight, bias)
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in leaves)
    width = group_width or x.shape[-1]
    options = (width, centered, zero_centered, gate_first, sigmoid, save)
    y, h, _, _ = call(*leaves, eps, *options)
    return y, h
