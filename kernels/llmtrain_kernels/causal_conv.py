"""Causal depthwise convolution: every channel sees its own last W tokens.

    y_t = act(bias + sum_{j=0}^{W-1} weight[:, W-1-j] * x_{t-j})    x_{t-j} in t's document, else 0

The short convolution before a recurrence (Poli et al. 2023, arXiv:2302.10866, section 3.1; Gu and
Dao 2023, arXiv:2312.00752, section 3.4). weight[:, -1] is the gain of the current token. Products
are summed in float32 (float64 stays) and rounded once.

Cost: W multiply-adds a channel and token, memory-bound; they are no matrix products and a mixer's
FLOPs leave them out, as they do norms. State: the last W - 1 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_state
from llmtrain_kernels.cost import Cost

BACKENDS = ("chunked", "reference")
ACTIVATIONS = ("silu", None)


def reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, one token after the other."""
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    batch, tokens, width = x_BTD.shape
    window = weight_DW.shape[1]
    weight_WD = weight_DW.mT.to(dtype)
    if initial_state_BWD is None:
        initial_state_BWD = x_BTD.new_zeros(batch, window - 1, width)
    last_BWD = initial_state_BWD.to(x_BTD.dtype)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            same_B = doc_ids_BT[:, t] == doc_ids_BT[:, t - 1]
            last_BWD = torch.where(same_B[:, None, None], last_BWD, 0)
        seen_BWD = torch.cat([last_BWD, x_BTD[:, t : t + 1]], dim=1)
        y_BD = (seen_BWD.to(dtype) * weight_WD).sum(dim=1)
        if bias_D is not None:
            y_BD = y_BD + bias_D.to(dtype)
        outputs.append(F.silu(y_BD) if activation == "silu" else y_BD)
        last_BWD = seen_BWD[:, 1:]
    y_BTD = torch.stack(outputs, dim=1).to(x_BTD.dtype)
    return y_BTD, last_BWD if return_state else None


def chunked(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """All tokens at once: one product for each distance, on views of one padded copy of x.

    The products promote x to float32 without a copy of it, so that what the backward pass keeps of
    x stays in x's dtype.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    tokens, window = x_BTD.shape[1], weight_DW.shape[1]
    weight_DW = weight_DW.to(dtype)
    if initial_state_BWD is None:
        seen_BSD = F.pad(x_BTD, (0, 0, window - 1, 0))
    else:
        seen_BSD = torch.cat([initial_state_BWD.to(x_BTD.dtype), x_BTD], dim=1)
    y_BTD = x_BTD * weight_DW[:, -1]
    for distance in range(1, window):
        first = window - 1 - distance
        term_BTD = seen_BSD[:, first : first + tokens] * weight_DW[:, first]
        if doc_ids_BT is not None:
            before_BT = F.pad(doc_ids_BT, (distance, 0), value=-1)[:, :tokens]
            term_BTD = torch.where((before_BT == doc_ids_BT)[..., None], term_BTD, 0)
        y_BTD = y_BTD + term_BTD
    if bias_D is not None:
        y_BTD = y_BTD + bias_D.to(dtype)
    y_BTD = y_BTD.to(x_BTD.dtype) if activation is None else F.silu(y_BTD).to(x_BTD.dtype)
    if not return_state:
        return y_BTD, None
    state_BWD = seen_BSD[:, tokens:]
    if doc_ids_BT is not None:
        ids_BS = F.pad(doc_ids_BT, (window - 1, 0), value=-1)
        same_BW = ids_BS[:, tokens:] == doc_ids_BT[:, -1:]
        state_BWD = torch.where(same_BW[..., None], state_BWD, 0)
    return y_BTD, state_BWD


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
    the state too. backend: auto | chunked | reference.
    ValueError for shapes that do not fit, or an initial state together with documents.
    """
    check(x_BTD, weight_DW, bias_D, activation, initial_state_BWD, doc_ids_BT, backend)
    run = reference if backend == "reference" else chunked
    return run(
        x_BTD,
        weight_DW,
        bias_D,
        activation=activation,
        initial_state_BWD=initial_state_BWD,
        doc_ids_BT=doc_ids_BT,
        return_state=return_state,
    )


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
