"""Scaling and rounding to float8, in the two layouts that a factor of products needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.launch import launch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ("tensorwise", "rowwise")
TINY = 1e-12  # amax of nothing but zeros


class Quantised(NamedTuple):
    """values: float8 [M, K], contiguous; inverse: float32 1 / s, [] or [M, 1]."""

    values: Tensor
    inverse: Tensor


class QuantisedWeight(NamedTuple):
    """A weight [F, D] for the forward product, and as [D, F] for the backward one."""

    forward: Quantised
    backward: Quantised


def quantise(x_MK: Tensor, dtype: torch.dtype, scaling: str) -> Quantised:
    """Scale so that the largest value of the tensor, or of each row, is the dtype's largest."""
    largest = torch.finfo(dtype).max
    wide_MK = x_MK if x_MK.dtype == torch.float64 else x_MK.to(torch.float32)
    dim = (0, 1) if scaling == "tensorwise" else (1,)
    amax = wide_MK.abs().amax(dim=dim, keepdim=scaling == "rowwise").clamp(min=TINY)
    scaled_MK = (wide_MK * (largest / amax)).clamp(-largest, largest)
    return Quantised(scaled_MK.to(dtype), (amax / largest).to(torch.float32))


def both_layouts(
    x_MK: Tensor, dtype: torch.dtype, scaling: str, *, fused: bool = True
) -> tuple[Quantised, Quantised]:
    """x quantised along its rows, [M, K], and along its columns, [K, M].

    fused: by the Triton kernel where it can run, which has one scale for the tensor.
    """
    if fused and scaling == "tensorwise" and can_fuse(x_MK):
        amax = largest_of(x_MK)
        rows_MK, columns_KM = cast_both(x_MK.contiguous(), amax, dtype)
        inverse = amax / torch.finfo(dtype).max
        return Quantised(rows_MK, inverse), Quantised(columns_KM, inverse)
    rows = quantise(x_MK, dtype, scaling)
    if scaling == "rowwise":
        return rows, quantise(x_MK.t().contiguous(), dtype, scaling)
    return rows, transposed(rows)


def transposed(x: Quantised) -> Quantised:
    """The other layout of a tensor with one scale."""
    return Quantised(x.values.t().contiguous(), x.inverse)


def quantise_weight(
    weight_FD: Tensor, scaling: str, out: QuantisedWeight | None = None
) -> QuantisedWeight:
    """Both layouts; into the memory of an earlier one when it is given."""
    if out is not None and scaling == "tensorwise" and can_fuse(weight_FD):
        amax = largest_of(weight_FD)
        launch_cast(weight_FD.contiguous(), amax, out.forward.values, out.backward.values)
        for part in out:
            torch.div(amax, torch.finfo(E4M3).max, out=part.inverse)
        return out
    forward, backward = both_layouts(weight_FD, E4M3, scaling)
    # Each its own scale: torch.compile takes no tensor twice as an argument of a function.
    made = QuantisedWeight(forward, backward._replace(inverse=backward.inverse.clone()))
    if out is None:
        return made
    for old, new in zip(out, made, strict=True):
        old.values.copy_(new.values)
        old.inverse.copy_(new.inverse)
    return out


def largest_of(x: Tensor) -> Tensor:
    """The largest absolute value, a float32 scalar on the device; nan where there is one."""
    return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=TINY)


def can_fuse(x: Tensor) -> bool:
    return x.is_cuda and triton_backend.unavailable("cuda", x.dtype) is None


@torch.library.custom_op("llmtrain::float8_cast_both", mutates_args=())
def cast_both(x_MK: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """([M, K], [K, M]) of a contiguous x, so scaled that amax becomes the dtype's largest."""
    rows_MK, columns_KM = outputs(x_MK, amax, dtype)
    launch_cast(x_MK, amax, rows_MK, columns_KM)
    return rows_MK, columns_KM


@cast_both.register_fake
def outputs(x_MK: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, k = x_MK.shape
    return x_MK.new_empty((m, k), dtype=dtype), x_MK.new_empty((k, m), dtype=dtype)


def launch_cast(
    x_MK: Tensor,
    amax: Tensor,
    rows_MK: Tensor,
    columns_KM: Tensor,
    config: dict[str, int] | None = None,
) -> None:
    """Fill both. config: rows, columns, num_warps of a tile; None: the pinned."""
    from llmtrain_kernels.float8.kernels import cast_both_kernel

    assert x_MK.is_contiguous()
    assert rows_MK.is_contiguous()
    assert columns_KM.is_contiguous()
    m, k = x_MK.shape
    if not m * k:
        return
    config = config or launch("float8_cast", x_MK.device, m * k)
    grid = (-(-m // config["rows"]), -(-k // config["columns"]))
    with torch.cuda.device_of(x_MK):
        cast_both_kernel[grid](
            x_MK,
            amax,
            rows_MK,
            columns_KM,
            m,
            k,
            torch.finfo(rows_MK.dtype).max,
            ROWS=config["rows"],
            COLUMNS=config["columns"],
            num_warps=config["num_warps"],
        )
