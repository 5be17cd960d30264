"""The causal convolution as Triton kernels (kernels.py): each x is read once, nothing else is kept.

Saved for the backward pass: the arguments, B T D numbers in x's dtype. Backward in two launches, of
which the second sums the gradients of weight and bias over spans of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain_kernels.direct import direct
from llmtrain_kernels.launch import launch

WINDOWS = range(1, 9)
MOST_REGISTERS = 255  # of a thread; the hardware's limit
STATE_REGISTERS = 16  # more than without a state
ALIGNMENTS = (8, 4, 2, 1)  # elements; 8 of bfloat16 are the most that a thread moves at once


def spans(batch: int, tokens: int, blocks: int, programs: int, rows: int) -> tuple[int, int]:
    """(tokens a span, spans a row), for about so many programs of `blocks` blocks of channels; a
    span has whole turns of `rows` tokens, and at least 16 tokens."""
    a_row = max(1, programs // (batch * blocks))
    tokens_each = max(16, -(-tokens // a_row))
    tokens_each = -(-tokens_each // rows) * rows
    return tokens_each, -(-tokens // tokens_each)


def units(*sizes: int) -> int:
    """The largest of ALIGNMENTS that divides all."""
    return next(n for n in ALIGNMENTS if all(size % n == 0 for size in sizes))


def row_major(x_BTD: Tensor) -> Tensor:
    """x, or a copy where channels are not side by side."""
    return x_BTD if x_BTD.stride(2) == 1 else x_BTD.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch_forward(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    doc_ids_BT: Tensor | None,
    silu: bool,
    want_state: bool,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y_BTD, the last inputs [B, W-1, D], of no rows unless wanted). config: None is pinned."""
    from llmtrain_kernels.causal_conv.kernels import causal_conv_fwd_kernel

    x_BTD, state_BWD, doc_ids_BT = row_major(x_BTD), contiguous(state_BWD), contiguous(doc_ids_BT)
    y_BTD, last_BWD = forward_outputs(x_BTD, weight_DW, want_state)
    batch, tokens, width = x_BTD.shape
    assert tokens > 0
    if y_BTD.numel() == 0:
        return y_BTD, last_BWD
    config = config or launch("causal_conv_fwd", x_BTD.device, x_BTD.numel())
    blocks = -(-width // config["block_d"])
    span, n_spans = spans(batch, tokens, blocks, config["programs"], config["rows"])
    align = units(width, x_BTD.stride(0), x_BTD.stride(1))
    with torch.cuda.device_of(x_BTD):
        causal_conv_fwd_kernel[(blocks * n_spans * batch,)](
            x_BTD,
            contiguous(weight_DW),
            contiguous(bias_D),
            state_BWD,
            doc_ids_BT,
            y_BTD,
            last_BWD if want_state else None,
            tokens,
            blocks,
            n_spans,
            width // align,
            span,
            x_BTD.stride(0) // align,
            x_BTD.stride(1) // align,
            W=weight_DW.shape[1],
            SILU=silu,
            ALIGN=align,
            **meta(config, weight_DW.shape[1], state=state_BWD is not None or want_state),
        )
    return y_BTD, last_BWD


def meta(config: dict[str, int], window: int, *, state: bool) -> dict[str, int]:
    """What the two large kernels take of a configuration: without `programs`, for spans().
    maxnreg: registers of a thread, for windows of up to 4; wider ones have more to hold, and so
    has a state: addresses."""
    registers = config["maxnreg"] + (STATE_REGISTERS if state else 0)
    return {
        "BLOCK_D": config["block_d"],
        "ROWS": config["rows"],
        "STAGES": config["num_stages"],
        "num_warps": config["num_warps"],
        "maxnreg": min(registers, MOST_REGISTERS) if window <= 4 else MOST_REGISTERS,
    }


def launch_backward(
    dy_BTD: Tensor,
    dlast_BWD: Tensor | None,
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    doc_ids_BT: Tensor | None,
    silu: bool,
    config: dict[str, int] | None = None,
    sum_config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx_BTD, dweight_DW, dbias_D, dstate_BWD); the last two empty without bias and state.
    config, sum_config: of the two launches, None is pinned."""
    from llmtrain_kernels.causal_conv.kernels import causal_conv_bwd_kernel

    x_BTD, dy_BTD = row_major(x_BTD), row_major(dy_BTD)
    dlast_BWD, state_BWD = contiguous(dlast_BWD), contiguous(state_BWD)
    gradients = backward_outputs(x_BTD, weight_DW, bias_D, state_BWD)
    dx_BTD, dweight_DW, dbias_D, dstate_BWD = gradients
    batch, tokens, width = x_BTD.shape
    window = weight_DW.shape[1]
    if dx_BTD.numel() == 0:
        return dx_BTD, dweight_DW.zero_(), dbias_D.zero_(), dstate_BWD
    config = config or launch("causal_conv_bwd", x_BTD.device, x_BTD.numel())
    blocks = -(-width // config["block_d"])
    span, n_spans = spans(batch, tokens, blocks, config["programs"], config["rows"])
    align = units(width, *x_BTD.stride()[:2], *dy_BTD.stride()[:2])
    sums_NWD = x_BTD.new_empty(batch * n_spans, window + 1, width, dtype=torch.float32)
    with torch.cuda.device_of(x_BTD):
        causal_conv_bwd_kernel[(blocks * n_spans * batch,)](
            dy_BTD,
            dlast_BWD,
            x_BTD,
            contiguous(weight_DW),
            contiguous(bias_D),
            state_BWD,
            contiguous(doc_ids_BT),
            dx_BTD,
            None if state_BWD is None else dstate_BWD,
            sums_NWD,
            tokens,
            blocks,
            n_spans,
            width // align,
            span,
            dy_BTD.stride(0) // align,
            dy_BTD.stride(1) // align,
            x_BTD.stride(0) // align,
            x_BTD.stride(1) // align,
            W=window,
            SILU=silu,
            ALIGN=align,
            **meta(config, window, state=state_BWD is not None or dlast_BWD is not None),
        )
    launch_sums(sums_NWD, dweight_DW, None if bias_D is None else dbias_D, sum_config)
    return gradients


def launch_sums(
    sums_NWD: Tensor,
    dweight_DW: Tensor,
    dbias_D: Tensor | None,
    config: dict[str, int] | None = None,
) -> None:
    """Writes the sums over N spans of the gradients of weight and bias [N, W + 1, D]."""
    from llmtrain_kernels.causal_conv.kernels import causal_conv_bwd_sum_kernel

    width, window = dweight_DW.shape
    config = config or launch("causal_conv_bwd_sum", sums_NWD.device, sums_NWD.shape[0])
    with torch.cuda.device_of(sums_NWD):
        causal_conv_bwd_sum_kernel[
            (-(-width // config["block_d"]), window + (dbias_D is not None))
        ](
            sums_NWD,
            dweight_DW,
            dbias_D,
            sums_NWD.shape[0],
            width,
            W=window,
            BLOCK_N=config["block_n"],
            BLOCK_D=config["block_d"],
            num_warps=config["num_warps"],
        )


def forward_outputs(x_BTD: Tensor, weight_DW: Tensor, want_state: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x_BTD.shape
    rows = weight_DW.shape[1] - 1 if want_state else 0
    return x_BTD.new_empty(batch, tokens, width), x_BTD.new_empty(batch, rows, width)


def backward_outputs(
    x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None, state_BWD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, width = x_BTD.shape
    rows = 0 if state_BWD is None else weight_DW.shape[1] - 1
    return (
        x_BTD.new_empty(batch, tokens, width),
        weight_DW.new_empty(weight_DW.shape),
        weight_DW.new_empty(0) if bias_D is None else bias_D.new_empty(width),
        x_BTD.new_empty(batch, rows, width),
    )


@torch.library.custom_op("llmtrain::causal_conv_forward", mutates_args=())
def forward(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    doc_ids_BT: Tensor | None,
    silu: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor]:
    """(y_BTD, the last inputs [B, W-1, D], of no rows unless wanted). The state in x's dtype."""
    return launch_forward(x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, silu, want_state)


@forward.register_fake
def _(x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, silu, want_state):
    return forward_outputs(x_BTD, weight_DW, want_state)


@torch.library.custom_op("llmtrain::causal_conv_backward", mutates_args=())
def backward(
    dy_BTD: Tensor,
    dlast_BWD: Tensor | None,
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    state_BWD: Tensor | None,
    doc_ids_BT: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx_BTD, dweight_DW, dbias_D, dstate_BWD); the last two empty without bias and state."""
    return launch_backward(dy_BTD, dlast_BWD, x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, silu)


@backward.register_fake
def _(dy_BTD, dlast_BWD, x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, silu):
    return backward_outputs(x_BTD, weight_DW, bias_D, state_BWD)


def setup_context(ctx, inputs, output) -> None:
    x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, ctx.silu, ctx.want_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT)


def gradients(take: Callable[..., tuple[Tensor, ...]], ctx, dy_BTD, dlast_BWD):
    """Of forward(). take: what has backward()'s arguments."""
    x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT = ctx.saved_tensors
    if dy_BTD is None:
        dy_BTD = torch.zeros_like(x_BTD)
    dlast_BWD = dlast_BWD if ctx.want_state else None
    dx, dweight, dbias, dstate = take(
        dy_BTD, dlast_BWD, x_BTD, weight_DW, bias_D, state_BWD, doc_ids_BT, ctx.silu
    )
    dbias = None if bias_D is None else dbias
    dstate = None if state_BWD is None else dstate
    return dx, dweight, dbias, dstate, None, None, None


forward.register_autograd(functools.partial(gradients, backward), setup_context=setup_context)
call = direct(forward, launch_forward, setup_context, functools.partial(gradients, launch_backward))


def fused(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state_BWD: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in one launch. Arguments as causal_conv()."""
    if initial_state_BWD is not None:
        initial_state_BWD = initial_state_BWD.to(x_BTD.dtype)
    y_BTD, last_BWD = call(
        x_BTD,
        weight_DW,
        bias_D,
        initial_state_BWD,
        doc_ids_BT,
        activation == "silu",
        return_state,
    )
    return y_BTD, last_BWD if return_state else None
