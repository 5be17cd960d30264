"""Grouped matmul: rows sorted by expert, each multiplied with its expert's matrix.

    y_p = W_e x_p    for ends_{e-1} <= p < ends_e,  ends_{-1} = 0

What a mixture of experts needs around it is here too: sorting (token, expert) pairs by expert, and
fetching rows in that order and back. P = N * A pairs of N tokens with A experts each.

FLOPs: 2 P D F forward, twice that backward; masked E times as many. Nothing of it waits for the
device, unless the loop runs on a GPU: it must know how many rows each expert has.

    backend   runs
    grouped   torch's grouped_mm: one kernel for all experts. CUDA from compute capability 8.0 on
              in bfloat16, CPU in float32 and half precision; rows of matrices must be multiples
              of 16 bytes. Groups need no alignment.
    loop      a matmul for each expert
    masked    a matmul of all rows for each expert, of which its own are kept. For CUDA graphs of
              small models in float32, which grouped does not take
    auto      grouped in bfloat16 on CUDA where it can run, else loop, as one operation to compile
"""

from __future__ import annotations

import functools
import itertools
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from llmtrain_kernels.cost import Cost

log = logging.getLogger(__name__)

BACKENDS = ("grouped", "loop", "masked")
ALIGNMENT = 16  # bytes of a matrix row's stride
GROUPED_DTYPES = {
    "cuda": (torch.bfloat16,),
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(x_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor, *, partial: bool = False) -> Tensor:
    """The definition: a matmul for each expert on its rows. Arguments as grouped_matmul."""
    matrices = weight_EFD.unbind(0)
    starts = [0, *ends_E.tolist()]
    parts = [x_PD[start:end] @ matrix.T for start, end, matrix in zip(starts, starts[1:], matrices)]
    if partial:
        parts.append(x_PD.new_zeros(len(x_PD) - starts[-1], weight_EFD.shape[1]))
    return torch.cat(parts)


def grouped_matmul(
    x_PD: Tensor,
    weight_EFD: Tensor,
    ends_E: Tensor,
    *,
    partial: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y_PF. ends_E: int32, where each expert's rows end; non-decreasing.

    partial: rows may follow the last end; they give zeros, and zero gradients. Without it the last
    end must be P. Raises ValueError when the backend is unknown or cannot run here.
    """
    d_out, d_in = weight_EFD.shape[1:]
    device = x_PD.device
    chosen = select_backend(backend, device.type, device.index, x_PD.dtype, d_in, d_out)
    if backend == "loop":
        return reference(x_PD, weight_EFD, ends_E, partial=partial)
    return rows_by_matrix(x_PD, weight_EFD, ends_E, chosen, partial)


@torch.compiler.assume_constant_result
def select_backend(
    requested: str, device: str, ordinal: int | None, dtype: torch.dtype, d_in: int, d_out: int
) -> str:
    """The backend that runs matrices [d_out, d_in]. Plain values in and out: under torch.compile it
    runs while tracing. ValueError when the requested one is unknown or cannot run."""
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"grouped_matmul backend: got {requested!r}, expected auto or one of "
            f"{', '.join(BACKENDS)}; set channel.backend"
        )
    if requested in ("loop", "masked"):
        return requested
    capability = torch.cuda.get_device_capability(ordinal) if device == "cuda" else None
    why_not = unsupported(device, capability, dtype, d_in, d_out)
    if requested == "grouped":
        if why_not is not None:
            raise ValueError(f"grouped_matmul backend=grouped: {why_not}; set channel.backend=auto")
        return "grouped"
    return choice(device, why_not)


@functools.cache
def choice(device: str, why_not: str | None) -> str:
    """What auto takes; the first time for a situation, it is logged with its reason."""
    chosen = "grouped" if device == "cuda" and why_not is None else "loop"
    reason = why_not or ("one kernel" if chosen == "grouped" else "no kernel to gain on a CPU")
    slow = device == "cuda" and chosen == "loop"
    level = logging.WARNING if slow else logging.INFO
    log.log(level, "grouped_matmul: %s on %s (%s)", chosen, device, reason)
    return chosen


def unsupported(
    device: str, capability: tuple[int, int] | None, dtype: torch.dtype, d_in: int, d_out: int
) -> str | None:
    """Why torch's grouped_mm cannot run, or None."""
    if native() is None:
        return "this torch has no grouped_mm"
    dtypes = GROUPED_DTYPES.get(device, ())
    if dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "nothing"
        return f"on {device} it takes {names}, not {str(dtype).removeprefix('torch.')}"
    if capability is not None and capability < (8, 0):
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    if any(width * dtype.itemsize % ALIGNMENT for width in (d_in, d_out)):
        multiple = ALIGNMENT // dtype.itemsize
        return f"widths {d_in} and {d_out} are not both multiples of {multiple}"
    return None


def native():
    """torch's function under the name that this version has, or None."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def own_rows(x_PD: Tensor, ends_E: Tensor) -> list[Tensor]:
    """For each expert, which rows are its own: bool [P, 1]."""
    rows_P1 = torch.arange(len(x_PD), device=x_PD.device)[:, None]
    starts_E = F.pad(ends_E[:-1], (1, 0))
    return [(rows_P1 >= start) & (rows_P1 < end) for start, end in zip(starts_E, ends_E)]


@torch.library.custom_op("llmtrain::grouped_matmul", mutates_args=())
def rows_by_matrix(
    x_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor, backend: str, partial: bool
) -> Tensor:
    """One operation for torch.compile, whatever runs it."""
    if backend == "loop":
        return reference(x_PD, weight_EFD, ends_E, partial=partial)
    if backend == "masked":
        y_PF = x_PD.new_zeros(x_PD.shape[0], weight_EFD.shape[1])
        for matrix, mine_P1 in zip(weight_EFD, own_rows(x_PD, ends_E)):
            y_PF = torch.where(mine_P1, x_PD @ matrix.T, y_PF)
        return y_PF
    y_PF = native()(x_PD.contiguous(), weight_EFD.transpose(1, 2), offs=ends_E)
    if partial:  # what lies behind the last end was never written
        rows_P = torch.arange(len(y_PF), device=y_PF.device)
        y_PF.masked_fill_((rows_P >= ends_E[-1])[:, None], 0)
    return y_PF


@rows_by_matrix.register_fake
def _(x_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor, backend: str, partial: bool) -> Tensor:
    return x_PD.new_empty(x_PD.shape[0], weight_EFD.shape[1])


@torch.library.custom_op("llmtrain::grouped_outer", mutates_args=())
def matrix_gradients(grad_PF: Tensor, x_PD: Tensor, ends_E: Tensor, backend: str) -> Tensor:
    """sum_p grad_p x_p^T over the rows of each expert: [E, F, D]."""
    if backend == "masked":
        own = own_rows(grad_PF, ends_E)
        return torch.stack([torch.where(mine_P1, grad_PF, 0).T @ x_PD for mine_P1 in own])
    if backend == "loop":
        starts = [0, *ends_E.tolist()]
        spans = [slice(start, end) for start, end in itertools.pairwise(starts)]
        return torch.stack([grad_PF[span].T @ x_PD[span] for span in spans])
    grad_EFD = native()(grad_PF.contiguous().T, x_PD.contiguous(), offs=ends_E)
    if grad_EFD.is_cuda and torch.cuda.get_device_capability(grad_EFD.device)[0] != 9:
        # Known on compute capability 10: an expert without rows gets what was in memory
        # (pytorch issue 172439).
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        grad_EFD.masked_fill_(empty_E[:, None, None], 0)
    return grad_EFD


@matrix_gradients.register_fake
def _(grad_PF: Tensor, x_PD: Tensor, ends_E: Tensor, backend: str) -> Tensor:
    return x_PD.new_empty(ends_E.shape[0], grad_PF.shape[1], x_PD.shape[1])


def keep_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    """Saved: x_PD, the matrices in the compute dtype, ends_E."""
    x_PD, weight_EFD, ends_E, ctx.backend, ctx.partial = inputs
    ctx.save_for_backward(x_PD, weight_EFD, ends_E)


def backward(ctx, grad_PF: Tensor) -> tuple[Tensor | None, ...]:
    x_PD, weight_EFD, ends_E = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        weight_EDF = weight_EFD.transpose(1, 2)
        grad_x = rows_by_matrix(grad_PF, weight_EDF, ends_E, ctx.backend, ctx.partial)
    if ctx.needs_input_grad[1]:
        grad_weight = matrix_gradients(grad_PF, x_PD, ends_E, ctx.backend)
    return grad_x, grad_weight, None, None, None


rows_by_matrix.register_autograd(backward, setup_context=keep_for_backward)


@register_flop_formula(torch.ops.llmtrain.grouped_matmul)
def rows_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """As if no row lay behind the last end: the formula sees shapes alone."""
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.llmtrain.grouped_outer)
def outer_flops(grad_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * grad_shape[1] * x_shape[1]


class Groups(NamedTuple):
    """(token, expert) pairs sorted by expert, among equals by token.

    order_P: sorted position -> pair n * A + a; inverse_P: pair -> sorted position; ends_E: int32,
    where each expert's pairs end; loads_E: int64, pairs that chose each expert, dropped ones too.
    """

    order_P: Tensor
    inverse_P: Tensor
    ends_E: Tensor
    loads_E: Tensor


def group_pairs(expert_NA: Tensor, n_experts: int, capacity: int | None = None) -> Groups:
    """Sort pairs by their expert. capacity: pairs that an expert takes, null for all; those of
    later tokens go behind the last end, so that what a token gets hangs on no later token."""
    experts_E = torch.arange(n_experts, device=expert_NA.device)
    sorted_P, order_P = expert_NA.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
    starts_E = F.pad(ends_E[:-1], (1, 0))
    loads_E = (ends_E - starts_E).to(torch.int64)
    places_P = torch.arange(len(order_P), device=order_P.device)
    if capacity is not None:
        kept_P = places_P - starts_E[sorted_P] < capacity
        sorted_P, again_P = torch.where(kept_P, sorted_P, n_experts).sort(stable=True)
        order_P = order_P[again_P]
        ends_E = torch.searchsorted(sorted_P, experts_E, right=True, out_int32=True)
    inverse_P = torch.empty_like(order_P).scatter_(0, order_P, places_P)
    return Groups(order_P, inverse_P, ends_E, loads_E)


class FetchRows(torch.autograd.Function):
    """x_ND -> the row of every pair, x_{order_p // A}: [P, D].

    Both ways a gather: autograd's own backward would add atomically.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, order_P: Tensor, inverse_P: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse_P)
        ctx.choices = choices
        return x_ND[order_P // choices]

    @staticmethod
    def backward(ctx, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_P,) = ctx.saved_tensors
        grad_NAD = grad_PD[inverse_P].unflatten(0, (-1, ctx.choices))
        return grad_NAD.sum(dim=1), None, None, None


def to_groups(x_ND: Tensor, groups: Groups, choices: int) -> Tensor:
    """Rows of tokens, in the order of the groups: [P, D]. choices: experts of a token, A."""
    return FetchRows.apply(x_ND, groups.order_P, groups.inverse_P, choices)


def from_groups(y_PD: Tensor, groups: Groups, choices: int) -> Tensor:
    """Rows of the groups, in the order of tokens: [N, A, D]."""
    y_PD = FetchRows.apply(y_PD, groups.inverse_P, groups.order_P, 1)
    return y_PD.unflatten(0, (-1, choices))


def cost(
    *, pairs: int, experts: int, d_in: int, d_out: int, dtype: torch.dtype
) -> tuple[Cost, Cost]:
    """(forward, backward) of one grouped matmul of that many rows."""
    flops = 2.0 * pairs * d_in * d_out
    rows_in, rows_out, matrices = pairs * d_in, pairs * d_out, experts * d_in * d_out
    size = dtype.itemsize
    forward = Cost(
        flops=flops,
        bytes_read=size * (rows_in + matrices),
        bytes_written=size * rows_out,
        saved_bytes=size * (rows_in + matrices),
    )
    backward = Cost(
        flops=2 * flops,
        bytes_read=size * (rows_in + 2 * rows_out + matrices),
        bytes_written=size * (rows_in + matrices),
    )
    return forward, backward
