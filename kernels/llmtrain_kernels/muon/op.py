"""momentum_step(), apply_updates(), symmetric_matmul(): the parts of Muon's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain_kernels import tensor_lists, triton_backend
from llmtrain_kernels.checks import check_backend
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.launch import launch
from llmtrain_kernels.muon import reference

BACKENDS = ("triton", "reference")
Launch = dict[str, int]
LISTED = ("BLOCK", "num_warps")
TILED = ("B", "BN", "BK", "num_warps", "num_stages")
UPDATES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 46340  # whose square is an int32


def momentum_step(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    momentum: float,
    nesterov: bool,
    dtype: torch.dtype,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
    config: Launch | None = None,
) -> list[Tensor]:
    """Take the gradients into the momenta, in place; what is to be orthogonalised, in that dtype.

    m = mu m + (1 - mu) g; the update is mu m + (1 - mu) g with nesterov, else m. Lists of equally
    many contiguous tensors of equal sizes, float32 for triton. Gradients are divided by grad_scale;
    where found_inf is 1 nothing changes and updates are zero: float32 scalars on the device.
    backend: auto | triton | reference. ValueError for lists that do not fit.
    """
    check_backend("momentum_step", backend, BACKENDS)
    kinds = {"gradients": gradients, "momenta": momenta}
    tensor_lists.check("momentum_step", kinds, "momenta")
    dtypes = frozenset(z.dtype for z in (*gradients, *momenta))
    device = momenta[0].device.type
    chosen = select_backend("momentum_step", backend, device, dtypes, dtype)
    if chosen == "triton":
        pinned = [] if config is None else [config[key] for key in LISTED]
        updates = [torch.empty_like(z, dtype=dtype) for z in momenta]
        momentum_triton(
            list(gradients),
            list(momenta),
            updates,
            grad_scale,
            found_inf,
            momentum,
            nesterov,
            pinned,
        )
        return updates
    return reference.momentum_step(
        gradients,
        momenta,
        momentum=momentum,
        nesterov=nesterov,
        dtype=dtype,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


@torch.compiler.assume_constant_result
def select_backend(
    operation: str,
    requested: str,
    device: str,
    dtypes: frozenset[torch.dtype],
    update: torch.dtype,
) -> str:
    """The backend that runs; plain values in and out. ValueError when triton cannot run."""
    why_not = triton_backend.unavailable(device)
    if why_not is None and dtypes != {torch.float32}:
        why_not = f"they take float32, not {', '.join(sorted(map(str, dtypes)))}"
    if why_not is None and update not in UPDATES:
        why_not = f"updates are one of {', '.join(map(str, UPDATES))}, not {update}"
    return triton_backend.select(operation, requested, device, why_not, "reference")


@torch.library.custom_op("llmtrain::muon_momentum_step", mutates_args=("momenta", "updates"))
def momentum_triton(
    gradients: list[Tensor],
    momenta: list[Tensor],
    updates: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    nesterov: bool,
    config: list[int],
) -> None:
    """One launch. config: LISTED, or empty."""
    from llmtrain_kernels.muon.kernels import KINDS, momentum_kernel

    size = sum(z.numel() for z in momenta)
    pinned = dict(zip(LISTED, config)) or launch("muon_momentum", momenta[0].device, size)
    scale, skip = (momenta[0] if z is None else z for z in (grad_scale, found_inf))  # not read
    with torch.cuda.device_of(momenta[0]):
        for kinds in tensor_lists.groups(gradients, momenta, updates):
            found = tensor_lists.table(kinds, pinned["BLOCK"])
            momentum_kernel[(found.blocks,)](
                found.entries,
                scale,
                skip,
                NEW=1.0 - momentum,
                NESTEROV=nesterov,
                SCALED=grad_scale is not None,
                SKIPS=found_inf is not None,
                KIND=KINDS[updates[0].dtype],
                ALIGNED=found.aligned,
                WIDTH=found.width,
                **pinned,
            )


@momentum_triton.register_fake
def _(*arguments: object) -> None:
    return None


def apply_updates(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    rate: float,
    decay: float,
    found_inf: Tensor | None = None,
    backend: str = "auto",
    config: Launch | None = None,
) -> None:
    """p = (1 - decay) p - rate u, in place; nothing where found_inf is 1, where u must be zero.

    Lists of equally many contiguous tensors of equal sizes; parameters float32 and updates float32,
    bfloat16 or float16 for triton. backend: auto | triton | reference.
    """
    check_backend("apply_updates", backend, BACKENDS)
    if not parameters:
        return
    kinds = {"parameters": parameters, "updates": updates}
    tensor_lists.check("apply_updates", kinds, "parameters")
    dtypes = frozenset(z.dtype for z in parameters)
    (update,) = {z.dtype for z in updates}
    device = parameters[0].device.type
    chosen = select_backend("apply_updates", backend, device, dtypes, update)
    if chosen == "triton":
        pinned = [] if config is None else [config[key] for key in LISTED]
        apply_triton(list(parameters), list(updates), found_inf, rate, decay, pinned)
        return
    reference.apply_updates(parameters, updates, rate=rate, decay=decay, found_inf=found_inf)


@torch.library.custom_op("llmtrain::muon_apply_updates", mutates_args=("parameters",))
def apply_triton(
    parameters: list[Tensor],
    updates: list[Tensor],
    found_inf: Tensor | None,
    rate: float,
    decay: float,
    config: list[int],
) -> None:
    """One launch. config: LISTED, or empty."""
    from llmtrain_kernels.muon.kernels import KINDS, apply_kernel

    size = sum(z.numel() for z in parameters)
    pinned = dict(zip(LISTED, config)) or launch("muon_apply", parameters[0].device, size)
    with torch.cuda.device_of(parameters[0]):
        for kinds in tensor_lists.groups(parameters, updates):
            found = tensor_lists.table(kinds, pinned["BLOCK"])
            apply_kernel[(found.blocks,)](
                found.entries,
                parameters[0] if found_inf is None else found_inf,
                rate,
                decay,
                SKIPS=found_inf is not None,
                KIND=KINDS[updates[0].dtype],
                ALIGNED=found.aligned,
                WIDTH=found.width,
                **pinned,
            )


@apply_triton.register_fake
def _(*arguments: object) -> None:
    return None


def symmetric_matmul(
    x_NRC: Tensor,
    other_NRC: Tensor | None = None,
    add_NRR: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    backend: str = "auto",
    config: Launch | None = None,
) -> Tensor:
    """alpha x other^T + beta add + diagonal I of every matrix, [N, R, R] in x's dtype.

    other_NRC: None for x itself, which gives a result symmetric to the bit; else one with which the
    product is symmetric but for rounding, as that of two polynomials of one symmetric matrix is.
    x and other in any strides, so that a transposed view costs no copy. add_NRR: symmetric,
    contiguous. Accumulates in float32. backend: auto | triton (bfloat16 and float16; half of the
    products: no tile above the diagonal) | reference. ValueError for shapes that do not
    fit.
    """
    check_backend("symmetric_matmul", backend, BACKENDS)
    n, rows, _ = x_NRC.shape
    if other_NRC is not None and (other_NRC.shape, other_NRC.dtype) != (x_NRC.shape, x_NRC.dtype):
        raise ValueError(
            f"symmetric_matmul: got other {tuple(other_NRC.shape)} {other_NRC.dtype} for x "
            f"{tuple(x_NRC.shape)} {x_NRC.dtype}, expected both alike"
        )
    if add_NRR is not None and (add_NRR.shape != (n, rows, rows) or not add_NRR.is_contiguous()):
        raise ValueError(
            f"symmetric_matmul: got add {tuple(add_NRR.shape)} for x {tuple(x_NRC.shape)}, "
            "expected contiguous [N, R, R]; give one symmetric matrix for each of x"
        )
    chosen = select_product("symmetric_matmul", backend, x_NRC.device.type, x_NRC.dtype, rows)
    if chosen == "triton":
        pinned = [] if config is None else [config[key] for key in TILED]
        return symmetric_triton(x_NRC, other_NRC, add_NRR, alpha, beta, diagonal, pinned)
    return reference.symmetric_matmul(
        x_NRC, other_NRC, add_NRR, alpha=alpha, beta=beta, diagonal=diagonal
    )


@torch.compiler.assume_constant_result
def select_product(
    operation: str, requested: str, device: str, dtype: torch.dtype, rows: int
) -> str:
    """The backend that runs; plain values in and out. ValueError when triton cannot run."""
    why_not = triton_backend.unavailable(device, dtype)
    if why_not is None and dtype == torch.float32 and not triton_backend.interpreted():
        if requested == "auto":  # what full precision is for: cuBLAS, without a warning
            return "reference"
        why_not = "they are for bfloat16 and float16, not float32"
    if why_not is None and rows > MOST_ROWS:
        why_not = f"they take {MOST_ROWS} rows at most, not {rows}"
    return triton_backend.select(operation, requested, device, why_not, "reference")


@torch.library.custom_op("llmtrain::symmetric_matmul", mutates_args=())
def symmetric_triton(
    x_NRC: Tensor,
    other_NRC: Tensor | None,
    add_NRR: Tensor | None,
    alpha: float,
    beta: float,
    diagonal: float,
    config: list[int],
) -> Tensor:
    """One launch. config: TILED, or empty."""
    from llmtrain_kernels.muon.kernels import symmetric_matmul_kernel

    n, rows, cols = x_NRC.shape
    other = x_NRC if other_NRC is None else other_NRC
    y_NRR = x_NRC.new_empty(n, rows, rows)
    pinned = dict(zip(TILED, config)) or launch("symmetric_matmul", x_NRC.device, rows)
    tiles = -(-rows // pinned["B"]) * -(-rows // pinned["BN"])
    even = not (rows % pinned["BN"] or cols % pinned["BK"])
    with torch.cuda.device_of(x_NRC):
        symmetric_matmul_kernel[(tiles, n)](
            x_NRC,
            other,
            y_NRR if add_NRR is None else add_NRR,
            y_NRR,
            rows,
            cols,
            *x_NRC.stride(),
            *other.stride(),
            alpha,
            beta,
            diagonal,
            ADD=add_NRR is not None,
            DIAGONAL=diagonal != 0,
            EVEN=even,
            PRECISION="ieee" if x_NRC.dtype == torch.float32 else "tf32",
            **pinned,
        )
    return y_NRR


@symmetric_triton.register_fake
def _(x_NRC, other_NRC, add_NRR, alpha, beta, diagonal, config):
    n, rows, _ = x_NRC.shape
    return x_NRC.new_empty(n, rows, rows)


def cost(count: int, *, update_bytes: int = 2) -> Cost:
    """Of momentum_step() and apply_updates() over so many parameters: gradient and momentum read,
    momentum and update written; update and weight read, weight written."""
    return Cost(
        flops=10.0 * count,
        bytes_read=(12.0 + update_bytes) * count,
        bytes_written=(8.0 + update_bytes) * count,
    )


def symmetric_cost(
    n: int, rows: int, cols: int, *, itemsize: int, other: bool = False, add: bool = False
) -> Cost:
    """Of symmetric_matmul(): the products on and below the diagonal."""
    factors = (2 if other else 1) * rows * cols
    return Cost(
        flops=float(n) * rows * (rows + 1) * cols,
        bytes_read=float(n) * itemsize * (factors + (rows * rows if add else 0)),
        bytes_written=float(n) * itemsize * rows * rows,
    )
