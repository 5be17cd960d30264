"""adamw_step(), sum_of_squares(): what an optimizer does to lists of tensors, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain_kernels import tensor_lists, triton_backend
from llmtrain_kernels.adamw import reference
from llmtrain_kernels.checks import check_backend
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.launch import launch

BACKENDS = ("triton", "torch", "reference")
Launch = dict[str, int]


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    backend: str = "auto",
    config: Launch | None = None,
) -> None:
    """One step of AdamW with decoupled decay, in place, without waiting for the device.

    Lists of equally many contiguous tensors: parameters, gradients and moments of equal sizes in
    float32 (float64 for torch and reference), steps: the float32 scalars that count what was
    applied. Gradients are divided by grad_scale; nothing changes, counters included, where
    found_inf is 1: both float32 scalars on the device. copies: bfloat16, get the new parameters.
    backend: auto | triton | torch (its fused step; it writes the divided gradients back) |
    reference. config: a launch other than the pinned one. ValueError for lists that do not fit.
    """
    check_backend("adamw_step", backend, BACKENDS)
    if not parameters:
        return
    kinds = {"parameters": parameters, "gradients": gradients, "means": means, "squares": squares}
    kinds |= {} if copies is None else {"copies": copies}
    tensor_lists.check("adamw_step", kinds, "parameters")
    if len(steps) != len(parameters):
        raise ValueError(
            f"adamw_step: got {len(steps)} steps for {len(parameters)} parameters, expected one "
            "each; give the counter of every parameter"
        )
    dtypes = frozenset(z.dtype for z in (*parameters, *gradients, *means, *squares))
    chosen = select_backend("adamw_step", backend, parameters[0].device.type, dtypes)
    if chosen == "triton":
        run_triton(
            list(parameters),
            list(gradients),
            list(means),
            list(squares),
            list(steps),
            [] if copies is None else list(copies),
            grad_scale,
            found_inf,
            lr,
            lr * weight_decay,
            beta1,
            beta2,
            eps,
            [] if config is None else [config["BLOCK"], config["num_warps"]],
        )
        return
    run = torch_step if chosen == "torch" else reference.adamw_step
    run(
        parameters,
        gradients,
        means,
        squares,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        found_inf=found_inf,
        copies=copies,
    )


@torch.compiler.assume_constant_result
def select_backend(
    operation: str, requested: str, device: str, dtypes: frozenset[torch.dtype]
) -> str:
    """The backend that runs; plain values in and out. ValueError when triton cannot run."""
    why_not = triton_backend.unavailable(device)
    if why_not is None and dtypes != {torch.float32}:
        why_not = f"they take float32, not {', '.join(sorted(map(str, dtypes)))}"
    return triton_backend.select(operation, requested, device, why_not, "torch")


def torch_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    copies: Sequence[Tensor] | None,
) -> None:
    """torch's fused step, as torch.optim.AdamW calls it."""
    torch._foreach_add_(list(steps), 1)
    torch._fused_adamw_(
        list(parameters),
        list(gradients),
        list(means),
        list(squares),
        [],
        list(steps),
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(list(steps), [found_inf] * len(steps))
    if copies is not None:
        torch._foreach_copy_(list(copies), list(parameters))


MUTATED = ("parameters", "means", "squares", "steps", "copies")


@torch.library.custom_op("llmtrain::adamw_step", mutates_args=MUTATED)
def run_triton(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    config: list[int],
) -> None:
    """Two launches for all counters, one for all else. config: BLOCK and num_warps, or empty."""
    from llmtrain_kernels.adamw.kernels import adamw_flat_kernel, adamw_list_kernel

    tensor_lists.count_step(steps, found_inf)
    device = parameters[0].device
    size = sum(z.numel() for z in parameters)
    pinned = dict(zip(("BLOCK", "num_warps"), config)) or launch("adamw", device, size)
    options = {
        "LOG_BETA1": log(beta1),
        "LOG_BETA2": log(beta2),
        "NEW1": 1.0 - beta1,
        "NEW2": 1.0 - beta2,
        "EPS": eps,
        "SCALED": grad_scale is not None,
        "SKIPS": found_inf is not None,
        "COPY": bool(copies),
    }
    scale, skip = (steps[0] if z is None else z for z in (grad_scale, found_inf))  # not read
    with torch.cuda.device_of(parameters[0]):
        for p, g, m, v, copy, step in tensor_lists.groups(
            parameters, gradients, means, squares, copies or parameters, steps
        ):
            if len(p) == 1:
                grid = (-(-p[0].numel() // pinned["BLOCK"]),)
                arguments = (p[0], g[0], m[0], v[0], copy[0], step[0], scale, skip, p[0].numel())
                adamw_flat_kernel[grid](*arguments, lr, decay, **options, **pinned)
            else:
                found = tensor_lists.table((p, g, m, v, copy, step), pinned["BLOCK"])
                adamw_list_kernel[(found.blocks,)](
                    found.entries,
                    scale,
                    skip,
                    lr,
                    decay,
                    **options,
                    ALIGNED=found.aligned,
                    WIDTH=found.width,
                    **pinned,
                )


@run_triton.register_fake
def _(*arguments: object) -> None:
    return None


def log(beta: float) -> float:
    """Its logarithm; of 0 one whose powers are 0 and that float32 has."""
    return math.log(beta) if beta > 0 else -1e30


def sum_of_squares(
    tensors: Sequence[Tensor], *, backend: str = "auto", config: Launch | None = None
) -> Tensor:
    """Over all elements of all tensors, a float64 scalar on their device; the same bits every time.

    backend: auto | triton (float32, one pass: a sum a block, then the sum of these in float64) |
    torch (its multi-tensor norm, squared) | reference.
    """
    check_backend("sum_of_squares", backend, BACKENDS)
    dtypes = frozenset(z.dtype for z in tensors)
    chosen = select_backend("sum_of_squares", backend, tensors[0].device.type, dtypes)
    if chosen == "triton":
        plain = [z if z.is_contiguous() else z.contiguous() for z in tensors]
        return squares_triton(plain, [] if config is None else list(config.values()))
    if chosen == "torch":
        return torch.nn.utils.get_total_norm(list(tensors)).to(torch.float64).square()
    return reference.sum_of_squares(tensors)


@torch.library.custom_op("llmtrain::sum_of_squares", mutates_args=())
def squares_triton(tensors: list[Tensor], config: list[int]) -> Tensor:
    """config: BLOCK and num_warps, or empty."""
    from llmtrain_kernels.adamw.kernels import squares_flat_kernel, squares_list_kernel

    device = tensors[0].device
    size = sum(z.numel() for z in tensors)
    pinned = dict(zip(("BLOCK", "num_warps"), config)) or launch("sum_of_squares", device, size)
    block = pinned["BLOCK"]
    counts = [-(-z.numel() // block) for z in tensors]
    partial = torch.empty(sum(counts), dtype=torch.float32, device=device)
    at = 0
    with torch.cuda.device_of(tensors[0]):
        for (some,) in tensor_lists.groups(tensors):
            if len(some) == 1:
                blocks = -(-some[0].numel() // block)
                if blocks:
                    squares_flat_kernel[(blocks,)](some[0], partial[at:], some[0].numel(), **pinned)
            else:
                found = tensor_lists.table((some,), block)
                blocks = found.blocks
                squares_list_kernel[(blocks,)](
                    found.entries,
                    partial[at:],
                    ALIGNED=found.aligned,
                    WIDTH=found.width,
                    **pinned,
                )
            at += blocks
    return partial.sum(dtype=torch.float64)


@squares_triton.register_fake
def _(tensors, config):
    return tensors[0].new_empty((), dtype=torch.float64)


def cost(count: int, *, copies: bool = False) -> Cost:
    """Of a step over so many parameters: p, g, m, v read, p, m, v written, 4 bytes each. FLOPs: 16
    a parameter with the gradient's division, the square root as one."""
    return Cost(
        flops=16.0 * count,
        bytes_read=16.0 * count,
        bytes_written=(14.0 if copies else 12.0) * count,
    )


def norm_cost(count: int) -> Cost:
    """Of sum_of_squares() over so many float32 values."""
    return Cost(flops=2.0 * count, bytes_read=4.0 * count, bytes_written=8.0)
