"""causal_conv(): the short convolution before a recurrence."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.causal_conv.chunked import chunked
from llmtrain_kernels.causal_conv.fused import WINDOWS, fused
from llmtrain_kernels.causal_conv.reference import reference
from llmtrain_kernels.checks import check_backend, check_state
from llmtrain_kernels.cost import Cost

RUN = {"triton": fused, "chunked": chunked, "reference": reference}
BACKENDS = tuple(RUN)
ACTIVATIONS = ("silu", None)


def causal_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y_BTD in x's dtype, the last W - 1 inputs [B, W-1, D] in x's dtype or None).

    activation: "silu" or None. initial_state_BWD: the inputs before the first token, zeros if None.
    doc_ids_BT: integers that never fall along a row; tokens of other documents count as zeros, in
    the state too. backend: auto | triton | chunked | reference; auto is triton on CUDA where it can
    run, else chunked.
    ValueError for shapes that do not fit, an initial state together with documents, or a backend
    that cannot run.
    """
    check(x_BTD, weight_DW, bias_D, activation, initial_state_BWD, doc_ids_BT, backend)
    dtypes = (x_BTD.dtype, weight_DW.dtype, weight_DW.dtype if bias_D is None else bias_D.dtype)
    chosen = select_backend(backend, x_BTD.device.type, dtypes, index(weight_DW.shape[1]))
    return RUN[chosen](
        x_BTD,
        weight_DW,
        bias_D,
        activation=activation,
        initial_state_BWD=initial_state_BWD,
        doc_ids_BT=doc_ids_BT,
        return_state=return_state,
    )


@torch.compiler.assume_constant_result
def select_backend(
    requested: str, device: str, dtypes: tuple[torch.dtype, ...], window: int
) -> str:
    """The backend that runs. Plain values in and out: under torch.compile it runs while tracing.
    ValueError when the requested one cannot run."""
    why_not = unsupported(device, dtypes, window)
    return triton_backend.select("causal_conv", requested, device, why_not, "chunked")


def unsupported(device: str, dtypes: tuple[torch.dtype, ...], window: int) -> str | None:
    """Why the kernels cannot run, or None."""
    why_not = triton_backend.unavailable(device, *dtypes)
    if why_not is None and window not in WINDOWS:
        why_not = f"they take windows of {WINDOWS[0]} to {WINDOWS[-1]} tokens, not {window}"
    return why_not


def check(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    initial_state_BWD: Tensor | None,
    doc_ids_BT: Tensor | None,
    backend: str,
) -> None:
    """ValueError when the arguments of causal_conv() do not fit together."""
    check_backend("causal_conv", backend, BACKENDS)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"causal_conv: got activation={activation!r}, expected 'silu' or None; set activation"
        )
    batch, _, width = x_BTD.shape
    if weight_DW.shape[0] != width or (bias_D is not None and bias_D.shape != (width,)):
        bias = None if bias_D is None else tuple(bias_D.shape)
        raise ValueError(
            f"causal_conv: got weight {tuple(weight_DW.shape)} and bias {bias} for {width} "
            "channels, expected one row and one entry a channel; give weight_DW and bias_D of x's D"
        )
    # the W - 1 inputs before the first token
    expected = (batch, weight_DW.shape[1] - 1, width)
    check_state("causal_conv", initial_state_BWD, expected, doc_ids_BT)


def cost(tokens: int, *, width: int, window: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T). Backward: the gradients of x and weight."""
    size = tokens * width * dtype.itemsize
    forward = Cost(
        flops=2.0 * tokens * width * window, bytes_read=size, bytes_written=size, saved_bytes=size
    )
    backward = Cost(
        flops=2 * forward.flops,
        recomputed_flops=forward.flops,  # the activation's derivative needs its argument
        bytes_read=2 * size,
        bytes_written=size,
    )
    return forward, backward
