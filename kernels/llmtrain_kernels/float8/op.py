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


def product(a: Quantised, b: Quantised, dtype: torch.dtype, backend: str) -> Tensor:
    """a_MK b_NK^T -> [M, N].

    Sums leave the tensor cores' own registers, of some 14 bits, for float32 ones every few terms
    (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2). To leave them there (use_fast_accum) is no
    faster on an H100: results/2026-11-23_dense_h100.
    """
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
        use_fast_accum=False,
    )
    return made.to(dtype)


# Operators, not an autograd.Function: torch.compile takes a gradient of zeros for what comes out of
# torch._scaled_mm, which has none of its own (torch 2.11).


@torch.library.custom_op("llmtrain::float8_linear", mutates_args=())
def forward(
    x_ND: Tensor,
    weight_FD: Tensor,
    w8_FD: Tensor,
    w8_inverse: Tensor,
    w8_DF: Tensor,
    w8_back_inverse: Tensor,
    scaling: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_NF, x quantised along its columns and its scale; those are empty when rowwise)."""
    if scaling == "tensorwise":
        x, kept = both_layouts(x_ND, E4M3, scaling, fused=backend == "scaled_mm")
    else:
        x, kept = quantise(x_ND, E4M3, scaling), nothing(x_ND)
    y_NF = product(x, Quantised(w8_FD, w8_inverse), x_ND.dtype, backend)
    return y_NF, *kept


def nothing(x: Tensor) -> Quantised:
    return Quantised(x.new_empty(0, dtype=E4M3), x.new_empty(0, dtype=torch.float32))


@forward.register_fake
def _(x_ND, weight_FD, w8_FD, w8_inverse, w8_DF, w8_back_inverse, scaling, backend):
    y_NF = x_ND.new_empty(x_ND.shape[0], w8_FD.shape[0])
    if scaling == "rowwise":
        return y_NF, *nothing(x_ND)
    kept_DN = x_ND.new_empty(x_ND.shape[::-1], dtype=E4M3)
    return y_NF, kept_DN, x_ND.new_empty((), dtype=torch.float32)


@torch.library.custom_op("llmtrain::float8_linear_backward", mutates_args=())
def backward(
    dy_NF: Tensor,
    kept: Tensor,
    kept_inverse: Tensor,
    w8_DF: Tensor,
    w8_inverse: Tensor,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    scaling: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx_ND, dW_FD). kept: x quantised along its columns, [D, N]; rowwise: x_ND itself."""
    dy, dy_FN = both_layouts(dy_NF, E5M2, scaling, fused=backend == "scaled_mm")
    dx_ND = product(dy, Quantised(w8_DF, w8_inverse), x_dtype, backend)
    x_DN = Quantised(kept, kept_inverse)
    if scaling == "rowwise":
        x_DN = quantise(kept.t().contiguous(), E4M3, scaling)
    return dx_ND, product(dy_FN, x_DN, w_dtype, backend)


@backward.register_fake
def _(dy_NF, kept, kept_inverse, w8_DF, w8_inverse, x_dtype, w_dtype, scaling, backend):
    (n, f), d = dy_NF.shape, w8_DF.shape[0]
    return dy_NF.new_empty((n, d), dtype=x_dtype), dy_NF.new_empty((f, d), dtype=w_dtype)


def setup_context(ctx, inputs, output) -> None:
    x_ND, weight_FD, _, _, w8_DF, w8_back_inverse, *ctx.how = inputs
    _, kept, kept_inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept, kept_inverse)
    ctx.dtypes = x_ND.dtype, weight_FD.dtype
    kept = x_ND if ctx.how[0] == "rowwise" else kept
    ctx.save_for_backward(kept, kept_inverse, w8_DF, w8_back_inverse)


def gradients(ctx, dy_NF, *_):
    found = (
        (None, None)
        if dy_NF is None
        else backward(dy_NF, *ctx.saved_tensors, *ctx.dtypes, *ctx.how)
    )
    return *found, *([None] * 6)


forward.register_autograd(gradients, setup_context=setup_context)


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
    made = quantised or quantise_weight(weight_FD.detach(), scaling)
    y_NF, *_ = forward(x_ND, weight_FD, *made.forward, *made.backward, scaling, backend)
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
