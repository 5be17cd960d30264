"""slstm(): the recurrence of the sLSTM."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.checks import check_backend, check_choice, check_state
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.slstm.loop import loop
from llmtrain_kernels.slstm.persistent import WARPS, persistent
from llmtrain_kernels.slstm.reference import State, reference

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
    why_not = unsupported(device, dtype, v_width)
    return triton_backend.select("slstm", requested, device, why_not, "loop")


def unsupported(device: str, dtype: torch.dtype, v_width: int) -> str | None:
    """Why the kernels cannot run, or None."""
    why_not = triton_backend.unavailable(device, dtype)
    if why_not is None and v_width not in WARPS:
        why_not = f"they take heads of width {', '.join(map(str, WARPS))}, not {v_width}"
    return why_not


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
