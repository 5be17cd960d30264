"""The linear layer: three products of quantised factors."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels.cost import Cost
from llmtrain_kernels.float8.quantise import (
    E4M3,
    E5M2,
    SCALINGS,
    Quantised,
    QuantisedWeight,
    both_layouts,
    quantise,
    quantise_weight,
)

BACKENDS = ("scaled_mm", "emulated")
MULTIPLE = 16
CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 products


def product(
    a: Quantised, b: Quantised, dtype: torch.dtype, backend: str, *, fast: bool = False
) -> Tensor:
    """a_MK b_NK^T -> [M, N]. fast: accumulate in the tensor cores' own registers."""
    if backend == "emulated":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a_MK, b_NK = (z.values.to(wide) * z.inverse.to(wide) for z in (a, b))
        return (a_MK @ b_NK.t()).to(dtype)
    rowwise = a.inverse.dim() > 0
    made = torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.inverse,
        scale_b=b.inverse.t() if rowwise else b.inverse,
        out_dtype=torch.bfloat16 if rowwise else dtype,  # rowwise kernels know no other
        use_fast_accum=fast,
    )
    return made.to(dtype)


class Float8Linear(torch.autograd.Function):
    """(x_ND, weight_FD, the weight quantised or four times None, scaling, backend) -> y_NF"""

    @staticmethod
    def forward(ctx, x_ND, weight_FD, w8_FD, w8_inverse, w8_DF, w8_back_inverse, scaling, backend):
        if w8_FD is None:
            weight = quantise_weight(weight_FD, scaling)
        else:
            weight = QuantisedWeight(
                Quantised(w8_FD, w8_inverse), Quantised(w8_DF, w8_back_inverse)
            )
        if scaling == "tensorwise":
            x, kept = both_layouts(x_ND, E4M3, scaling, fused=backend == "scaled_mm")
        else:
            x, kept = quantise(x_ND, E4M3, scaling), Quantised(x_ND, None)
        ctx.save_for_backward(*kept, *weight.backward)
        ctx.scaling, ctx.backend = scaling, backend
        ctx.dtypes = x_ND.dtype, weight_FD.dtype
        return product(x, weight.forward, x_ND.dtype, backend, fast=True)

    @staticmethod
    def backward(ctx, dy_NF):
        x_values, x_inverse, w_values, w_inverse = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        scaling, backend = ctx.scaling, ctx.backend
        dy, dy_FN = both_layouts(dy_NF, E5M2, scaling, fused=backend == "scaled_mm")
        dx_ND = product(dy, Quantised(w_values, w_inverse), x_dtype, backend)
        x_DN = Quantised(x_values, x_inverse)
        if scaling == "rowwise":
            x_DN = quantise(x_values.t().contiguous(), E4M3, scaling)
        dw_FD = product(dy_FN, x_DN, w_dtype, backend)
        return dx_ND, dw_FD, *([None] * 6)


def float8_linear(
    x: Tensor,
    weight_FD: Tensor,
    *,
    scaling: str = "tensorwise",
    quantised: QuantisedWeight | None = None,
    backend: str = "scaled_mm",
) -> Tensor:
    """x_..D W^T -> [.., F]. quantised: of this weight, made earlier; None: made here.

    backend: scaled_mm; emulated takes the same rounded values and multiplies them in float32
    (float64 when x is), on any device.
    """
    assert scaling in SCALINGS, scaling
    assert backend in BACKENDS, backend
    assert weight_FD.shape[0] % MULTIPLE == 0 == weight_FD.shape[1] % MULTIPLE, weight_FD.shape
    x_ND = x.reshape(-1, x.shape[-1])
    assert x_ND.shape[0] % MULTIPLE == 0, x.shape
    made = (None,) * 4 if quantised is None else (*quantised.forward, *quantised.backward)
    y_NF = Float8Linear.apply(x_ND, weight_FD, *made, scaling, backend)
    return y_NF.reshape(*x.shape[:-1], weight_FD.shape[0])


def unavailable(device: torch.device) -> str | None:
    """Why a device has no float8 products, or None."""
    if device.type != "cuda":
        return f"{device.type} has no float8 products"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} (compute capability "
            f"{'.'.join(map(str, capability))}) has no float8 products"
        )
    return None


def cost(tokens: int, d_in: int, d_out: int, *, itemsize: int = 2) -> tuple[Cost, Cost]:
    """(forward, backward), tensorwise with a quantised weight. itemsize: of x and dy."""
    x, y, w = tokens * d_in, tokens * d_out, d_in * d_out
    forward = Cost(
        flops=2.0 * tokens * w,
        bytes_read=float(itemsize * x + w),
        bytes_written=float(itemsize * y + x),
        saved_bytes=float(x),
    )
    backward = Cost(
        flops=4.0 * tokens * w,
        bytes_read=float(itemsize * y + x + w),
        bytes_written=float(itemsize * x + 4 * w),
    )
    return forward, backward
