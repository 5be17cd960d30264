"""rope(): rotary embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.checks import check_backend
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.rope.fused import fused
from llmtrain_kernels.rope.reference import formula, reference

RUN = {"triton": fused, "torch": formula, "reference": reference}
BACKENDS = tuple(RUN)


def rope(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    *,
    interleaved: bool = False,
    part: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(q, k) with 2 R dimensions of every head turned, new tensors in their dtype.

    k_BTGK: None if there are none; its heads may have another width than those of q. Heads,
    tokens and rows may lie apart, as in views of one packed projection. cos_BTR, sin_BTR: float32
    [B or 1, T, R] without gradients. interleaved: pairs are (2 i, 2 i + 1), not (i, i + R).
    part: None, a head's first 2 R dimensions turn; else the first 2 R of its last `part`, as in
    latent attention.
    backend: auto | triton | torch | reference; auto is triton on CUDA where it can run, else torch.
    ValueError for arguments that do not fit together, or a backend that cannot run.
    """
    check(q_BTHK, k_BTGK, cos_BTR, sin_BTR, part, backend)
    chosen = select_backend(backend, q_BTHK.device.type, q_BTHK.dtype, cos_BTR.dtype)
    return RUN[chosen](q_BTHK, k_BTGK, cos_BTR, sin_BTR, interleaved=interleaved, part=part)


@torch.compiler.assume_constant_result
def select_backend(requested: str, device: str, dtype: torch.dtype, angles: torch.dtype) -> str:
    """The backend that runs. Plain values in and out: under torch.compile it runs while tracing.
    ValueError when the requested one cannot run."""
    why_not = triton_backend.unavailable(device, dtype)
    if why_not is None and angles != torch.float32:
        why_not = f"they take angles in float32, not {str(angles).split('.')[-1]}"
    return triton_backend.select("rope", requested, device, why_not, "torch")


def check(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    part: int | None,
    backend: str,
) -> None:
    """ValueError when the arguments of rope() do not fit together."""
    check_backend("rope", backend, BACKENDS)
    batch, tokens = q_BTHK.shape[:2]
    if (
        cos_BTR.shape != sin_BTR.shape
        or cos_BTR.dim() != 3
        or cos_BTR.shape[0] not in (1, batch)
        or cos_BTR.shape[1] != tokens
    ):
        raise ValueError(
            f"rope: got cos {tuple(cos_BTR.shape)} and sin {tuple(sin_BTR.shape)} for queries "
            f"{tuple(q_BTHK.shape)}, expected both [{batch} or 1, {tokens}, R]; give the angles of "
            "these tokens"
        )
    if cos_BTR.requires_grad or sin_BTR.requires_grad:
        raise ValueError(
            "rope: got angles that require gradients, expected constants; detach cos and sin"
        )
    for x in (q_BTHK,) if k_BTGK is None else (q_BTHK, k_BTGK):
        if part is not None and part > x.shape[-1]:
            raise ValueError(
                f"rope: got part={part}, expected at most the head's {x.shape[-1]}; set part"
            )
        width = x.shape[-1] if part is None else part
        if 2 * cos_BTR.shape[2] > width:
            raise ValueError(
                f"rope: got angles for a width of {2 * cos_BTR.shape[2]}, expected at most the "
                f"head's {width}; set the rotated width to it"
            )
        if x.shape[:2] != (batch, tokens) or x.dtype != q_BTHK.dtype:
            raise ValueError(
                f"rope: got queries {tuple(q_BTHK.shape)} in {q_BTHK.dtype} and keys "
                f"{tuple(x.shape)} in {x.dtype}, expected the same rows, tokens and dtype; give "
                "keys of the same tokens"
            )


def cost(
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    k_width: int,
    turned: int,
    dtype: torch.dtype,
    kv_width: int | None = None,
    angles: int | None = None,
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T). turned: 2 R. kv_width: of keys, None for
    k_width. angles: tokens that have angles, fewer when rows share them. Elementwise: no FLOPs are
    counted; what stays for the backward pass is the angles."""
    widths = heads * k_width + kv_heads * (k_width if kv_width is None else kv_width)
    part = tokens * widths * dtype.itemsize
    given = (tokens if angles is None else angles) * turned * torch.float32.itemsize
    forward = Cost(flops=0.0, bytes_read=part + given, bytes_written=part, saved_bytes=given)
    return forward, Cost(flops=0.0, bytes_read=part + given, bytes_written=part)
