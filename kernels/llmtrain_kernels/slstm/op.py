"""slstm(): the recurrence of the sLSTM."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec
from operator import index

import torch
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_choice, check_state
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.slstm.loop import loop
from llmtrain_kernels.slstm.persistent import WARPS, persistent
from llmtrain_kernels.slstm.reference import State, reference

log = logging.getLogger(__name__)

HAS_TRITON = find_spec("triton") is not None
RUN = {"triton": persistent, "loop": loop, "reference": reference}
BACKENDS = tuple(RUN)
FORGET_GATES = ("sigmoid", "exp")


def slstm(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    *,
    forget_gate: str = "sigmoid",
    initial_state: State | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """(h_BTHV in x's dtype, the state after the last token or None).

    x_BTHX: what the tokens and biases give to the pre-activations z, i, f, o of each head, X = 4 V;
    any finite size. r_HVX: what h_{t-1} adds, a block a head. forget_gate: "sigmoid" or "exp".
    initial_state, and the one returned: (h, c, n, m), each [B, H, V] in float32 (float64); None is
    zeros. In the loop's gradient the returned m is a constant: c exp(m) and n exp(m) have theirs.
    doc_ids_BT: integers >= 0 that never fall along a row; a new one starts from the zero state.
    backend: auto | triton | loop | reference; auto is triton on CUDA where it can run, else loop.
    ValueError for arguments that do not fit together, or a backend that cannot run.
    """
    check(x_BTHX, r_HVX, forget_gate, initial_state, doc_ids_BT, backend)
    chosen = select_backend(backend, x_BTHX.device.type, x_BTHX.dtype, index(r_HVX.shape[1]))
    return RUN[chosen](
        x_BTHX,
        r_HVX,
        forget_gate=forget_gate,
        initial_state=initial_state,
        doc_ids_BT=doc_ids_BT,
        return_state=return_state,
    )


@torch.compiler.assume_constant_result
def select_backend(requested: str, device: str, dtype: torch.dtype, v_width: int) -> str:
    """The backend that runs heads of this width. Plain values in and out: under torch.compile it
    runs while tracing. ValueError when the requested one cannot run."""
    if requested not in ("auto", "triton"):
        return requested
    why_not = unsupported(device, dtype, v_width)
    if requested == "auto":
        return choice(device, why_not)
    if why_not is not None:
        raise ValueError(
            f"slstm: got backend='triton', expected one that can run, as of its kernels {why_not}; "
            "set backend to auto or loop"
        )
    return requested


@functools.cache
def choice(device: str, why_not: str | None) -> str:
    """What auto takes; the first time for a situation, it is logged with its reason."""
    chosen = "triton" if device == "cuda" and why_not is None else "loop"
    level = logging.WARNING if device == "cuda" and chosen == "loop" else logging.INFO
    reason = "one launch for all tokens" if chosen == "triton" else why_not or "made for a GPU"
    log.log(level, "slstm: %s on %s (%s)", chosen, device, reason)
    return chosen


def unsupported(device: str, dtype: torch.dtype, v_width: int) -> str | None:
    """Why the kernels cannot run, or None."""
    if not HAS_TRITON:
        return "triton is not installed; pip install triton"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"they run on cuda, not {device}"
    if torch.promote_types(dtype, torch.float32) != torch.float32:
        return f"they compute in float32, not {str(dtype).removeprefix('torch.')}"
    if v_width not in WARPS:
        return f"they take heads of width {', '.join(map(str, WARPS))}, not {v_width}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(
    x_BTHX: Tensor,
    r_HVX: Tensor,
    forget_gate: str,
    initial_state: State | None,
    doc_ids_BT: Tensor | None,
    backend: str,
) -> None:
    """ValueError when the arguments of slstm() do not fit together."""
    check_backend("slstm", backend, BACKENDS)
    check_choice("slstm", "forget_gate", forget_gate, FORGET_GATES)
    batch, _, heads, x_width = x_BTHX.shape
    v_width = r_HVX.shape[1]
    if r_HVX.shape != (heads, v_width, x_width) or x_width != 4 * v_width:
        raise ValueError(
            f"slstm: got x {tuple(x_BTHX.shape)} and r {tuple(r_HVX.shape)}, expected "
            "[B, T, H, 4 V] and [H, V, 4 V]; give the pre-activations of the gates side by side"
        )
    check_state("slstm", initial_state, [(batch, heads, v_width)] * 4, doc_ids_BT)


def cost(
    tokens: int, *, heads: int, v_width: int, dtype: torch.dtype, backend: str = "triton"
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T). Backward: the gradients of h and R; the loop
    forms the pre-activations once more. R is read once: it would have to stay on the chip."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    units, r_bytes = tokens * heads * v_width, heads * v_width * 4 * v_width * wide
    kept = 7 if backend == "triton" else 8  # 4 of the gates, c, n, h, and m
    forward = Cost(
        flops=8.0 * units * v_width,
        bytes_read=4 * units * dtype.itemsize + r_bytes,
        bytes_written=units * dtype.itemsize,
        saved_bytes=kept * units * wide,
    )
    backward = Cost(
        flops=2 * forward.flops,
        recomputed_flops=0.0 if backend == "triton" else forward.flops,
        bytes_read=kept * units * wide + units * dtype.itemsize + r_bytes,
        bytes_written=4 * units * dtype.itemsize + r_bytes,
    )
    return forward, backward
