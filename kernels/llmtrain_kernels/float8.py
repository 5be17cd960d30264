"""A linear layer whose three products run in float8, scaled anew at every call.

    quantise   s = max_8 / amax(x),  x8 = round(s x)      amax over the tensor, or over what a
               x = x8 / s                                 product sums (rowwise)
    forward    y  = x  W^T     x, W in e4m3 (4 bits of exponent, 3 of mantissa, up to 448)
    backward   dx = dy W       dy in e5m2 (5 bits, 2 bits, up to 57344): gradients spread wider
               dW = dy^T x

Micikevicius et al. 2022, arXiv:2209.05433. Products accumulate in float32; y and dx come in the
dtype of x, dW in that of W. Tensor cores want both factors laid out along what they sum over, so
every factor is quantised in two layouts; with one scale a tensor the second is a transposed copy of
the first, with rowwise scales it is rounded by itself.

Saved for the backward pass: x8 (1 byte an element; rowwise: x), and the weight's second layout.
Widths and numbers of tokens are multiples of 16, as cuBLAS wants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain_kernels.cost import Cost

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ("tensorwise", "rowwise")
BACKENDS = ("scaled_mm", "emulated")
MULTIPLE = 16
CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 products
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


def quantise_weight(weight_FD: Tensor, scaling: str) -> QuantisedWeight:
    """Both layouts."""
    forward = quantise(weight_FD, E4M3, scaling)
    if scaling == "rowwise":
        return QuantisedWeight(forward, quantise(weight_FD.t().contiguous(), E4M3, scaling))
    backward = transposed(forward)
    # Each its own scale: torch.compile takes no tensor twice as an argument of a function.
    return QuantisedWeight(forward, backward._replace(inverse=backward.inverse.clone()))


def transposed(x: Quantised) -> Quantised:
    """The other layout of a tensor with one scale."""
    return Quantised(x.values.t().contiguous(), x.inverse)


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
        x = quantise(x_ND, E4M3, scaling)
        kept = x if scaling == "tensorwise" else Quantised(x_ND, x.inverse)
        ctx.save_for_backward(*kept, *weight.backward)
        ctx.scaling, ctx.backend = scaling, backend
        ctx.dtypes = x_ND.dtype, weight_FD.dtype
        return product(x, weight.forward, x_ND.dtype, backend, fast=True)

    @staticmethod
    def backward(ctx, dy_NF):
        x_values, x_inverse, w_values, w_inverse = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        scaling, backend = ctx.scaling, ctx.backend
        dy = quantise(dy_NF, E5M2, scaling)
        dx_ND = product(dy, Quantised(w_values, w_inverse), x_dtype, backend)
        if scaling == "tensorwise":
            dy_FN, x_DN = transposed(dy), transposed(Quantised(x_values, x_inverse))
        else:
            dy_FN = quantise(dy_NF.t().contiguous(), E5M2, scaling)
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
