"""rms_norm(), layer_norm(), the same of a sum with a residual, and gated."""

from __future__ import annotations

from operator import index
from types import ModuleType

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.checks import check_backend, check_choice
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.norm import plain, reference
from llmtrain_kernels.norm.fused import WIDEST, normalise

BACKENDS = ("triton", "torch", "reference")
OTHERS: dict[str, ModuleType] = {"torch": plain, "reference": reference}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    group_width: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y of x's shape and dtype. x: [.., D], read where it lies. weight: [D], of any dtype.

    zero_centered: gains are 1 + weight. group_width: of the groups of D that are normalised each by
    itself, None for all of D. backend: auto | triton | torch | reference; auto is triton on CUDA
    where it can run, else torch. ValueError for arguments that do not fit together, or a backend
    that cannot run.
    """
    chosen = choose("rms_norm", backend, (x,), (weight,), group_width)
    if chosen != "triton":
        run = OTHERS[chosen].rms_norm
        return run(x, weight, eps=eps, zero_centered=zero_centered, group_width=group_width)
    options = {"eps": eps, "group_width": group_width, "zero_centered": zero_centered}
    return normalise(x, None, None, weight, None, centered=False, **options)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    zero_centered: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, h): h = x + residual, rounded to their dtype, and y the norm of h, by the kernels of h
    before it is rounded. Else as rms_norm()."""
    chosen = choose("add_rms_norm", backend, (x, residual), (weight,), None)
    if chosen != "triton":
        run = OTHERS[chosen].add_rms_norm
        return run(x, residual, weight, eps=eps, zero_centered=zero_centered)
    options = {"eps": eps, "group_width": None, "zero_centered": zero_centered}
    return normalise(x, residual, None, weight, None, centered=False, **options)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    group_width: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y of x's shape and dtype. bias: [D] or None. Else as rms_norm()."""
    chosen = choose("layer_norm", backend, (x,), (weight, bias), group_width)
    if chosen != "triton":
        return OTHERS[chosen].layer_norm(x, weight, bias, eps=eps, group_width=group_width)
    options = {"eps": eps, "group_width": group_width}
    return normalise(x, None, None, weight, bias, centered=True, **options)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y, h): h = x + residual, rounded to their dtype, and y the norm of h, by the kernels of h
    before it is rounded. Else as layer_norm()."""
    chosen = choose("add_layer_norm", backend, (x, residual), (weight, bias), None)
    if chosen != "triton":
        return OTHERS[chosen].add_layer_norm(x, residual, weight, bias, eps=eps)
    return normalise(x, residual, None, weight, bias, centered=True, eps=eps, group_width=None)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_width: int | None = None,
    norm_before_gate: bool,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """norm(x a(gate)) weight, or norm(x) weight a(gate) where norm_before_gate, of gate's dtype.

    gate: of x's shape; its dtype may be another. activation: a, silu or sigmoid. Else as
    rms_norm().
    """
    check_choice("gated_rms_norm", "activation", activation, reference.ACTIVATIONS)
    chosen = choose("gated_rms_norm", backend, (x, gate), (weight,), group_width)
    options = {"eps": eps, "group_width": group_width}
    if chosen != "triton":
        options |= {"norm_before_gate": norm_before_gate, "activation": activation}
        return OTHERS[chosen].gated_rms_norm(x, gate, weight, **options)
    options |= {"gate_first": not norm_before_gate, "sigmoid": activation == "sigmoid"}
    return normalise(x, None, gate, weight, None, centered=False, **options)[0]


def gated_layer_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    group_width: int | None = None,
    norm_before_gate: bool,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """As gated_rms_norm(), with the mean taken off and an optional bias before the gate."""
    check_choice("gated_layer_norm", "activation", activation, reference.ACTIVATIONS)
    chosen = choose("gated_layer_norm", backend, (x, gate), (weight, bias), group_width)
    options = {"eps": eps, "group_width": group_width}
    if chosen != "triton":
        options |= {"norm_before_gate": norm_before_gate, "activation": activation}
        return OTHERS[chosen].gated_layer_norm(x, gate, weight, bias, **options)
    options |= {"gate_first": not norm_before_gate, "sigmoid": activation == "sigmoid"}
    return normalise(x, None, gate, weight, bias, centered=True, **options)[0]


def choose(
    operation: str,
    backend: str,
    rows: tuple[Tensor, ...],
    vectors: tuple[Tensor | None, ...],
    group_width: int | None,
) -> str:
    """The backend that runs, after the checks."""
    check(operation, backend, rows, vectors, group_width)
    x = rows[0]
    dtypes = tuple(z.dtype for z in (*rows, *vectors) if z is not None)
    width = index(x.shape[-1] if group_width is None else group_width)
    return select_backend(operation, backend, x.device.type, dtypes, width)


@torch.compiler.assume_constant_result
def select_backend(
    operation: str, requested: str, device: str, dtypes: tuple[torch.dtype, ...], width: int
) -> str:
    """The backend that runs rows of this width. Plain values in and out: under torch.compile it
    runs while tracing. ValueError when the requested one cannot run."""
    why_not = unsupported(device, dtypes, width)
    return triton_backend.select(operation, requested, device, why_not, "torch")


def unsupported(device: str, dtypes: tuple[torch.dtype, ...], width: int) -> str | None:
    """Why the kernels cannot run, or None."""
    why_not = triton_backend.unavailable(device, *dtypes)
    if why_not is None and width > WIDEST:
        why_not = f"they take rows up to {WIDEST} wide, not {width}"
    return why_not


def check(
    operation: str,
    backend: str,
    rows: tuple[Tensor, ...],
    vectors: tuple[Tensor | None, ...],
    group_width: int | None,
) -> None:
    """ValueError when arguments do not fit together."""
    check_backend(operation, backend, BACKENDS)
    x, width = rows[0], rows[0].shape[-1]
    for other in rows[1:]:
        if other.shape != x.shape:
            raise ValueError(
                f"{operation}: got {tuple(x.shape)} and {tuple(other.shape)}, expected one shape; "
                "give tensors of the same rows"
            )
        if operation.startswith("add") and other.dtype != x.dtype:
            raise ValueError(
                f"{operation}: got x of {x.dtype} and residual of {other.dtype}, expected one "
                "dtype; cast one of them"
            )
    for vector in vectors:
        if vector is not None and vector.shape != (width,):
            raise ValueError(
                f"{operation}: got a weight or bias {tuple(vector.shape)} for rows of {width}, "
                f"expected [{width}]; give one number a channel"
            )
    if group_width is not None and (group_width < 1 or width % group_width):
        raise ValueError(
            f"{operation}: got group_width={group_width} for rows of {width}, expected a divisor; "
            "set group_width"
        )


def cost(
    rows: int,
    width: int,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float32,
    group_width: int | None = None,
    residual: bool = False,
    gate: bool = False,
    bias: bool = False,
    centered: bool = False,
) -> tuple[Cost, Cost]:
    """(forward, backward). No FLOPs: no matrix is multiplied. x, residual and gate of one dtype."""
    tensor = rows * width * dtype.itemsize
    vectors = (2 if bias else 1) * width * weight_dtype.itemsize
    statistics = rows * (width // (group_width or width)) * (8 if centered else 4)
    more, twice = residual + gate, 1 + residual
    forward = Cost(
        flops=0.0,
        bytes_read=(1 + more) * tensor + vectors,
        bytes_written=twice * tensor + statistics,
        saved_bytes=(1 + gate) * tensor + statistics,
    )
    backward = Cost(
        flops=0.0,
        bytes_read=(2 + more) * tensor + vectors + statistics,
        bytes_written=(1 + gate) * tensor + vectors,
    )
    return forward, backward
