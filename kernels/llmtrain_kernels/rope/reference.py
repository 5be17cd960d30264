"""The definition of rotary embedding, and the torch formula of the CPU beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    *,
    interleaved: bool = False,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Every dimension by its own partner, in float32 at least. Arguments as rope()."""
    half = cos_BTR.shape[-1]
    device = cos_BTR.device
    a_R = torch.arange(half, device=device) * (2 if interleaved else 1)
    b_R = a_R + (1 if interleaved else half)

    def turned(x_BTHK: Tensor) -> Tensor:
        start = 0 if part is None else x_BTHK.shape[-1] - part
        wide = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
        a_BTHR, b_BTHR = wide[..., start + a_R], wide[..., start + b_R]
        cos_BT1R, sin_BT1R = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
        out = wide.index_copy(-1, start + a_R, a_BTHR * cos_BT1R - b_BTHR * sin_BT1R)
        out = out.index_copy(-1, start + b_R, b_BTHR * cos_BT1R + a_BTHR * sin_BT1R)
        return out.to(x_BTHK.dtype)

    return turned(q_BTHK), None if k_BTGK is None else turned(k_BTGK)


def formula(
    q_BTHK: Tensor,
    k_BTGK: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    *,
    interleaved: bool = False,
    part: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same by halves that are put together. Arguments as rope()."""
    q_BTHK = by_halves(q_BTHK, cos_BTR, sin_BTR, interleaved, part)
    if k_BTGK is not None:
        k_BTGK = by_halves(k_BTGK, cos_BTR, sin_BTR, interleaved, part)
    return q_BTHK, k_BTGK


def by_halves(
    x_BTHK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool, part: int | None
) -> Tensor:
    """Computes in at least float32."""
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    start = 0 if part is None else x_BTHK.shape[-1] - part
    end = start + 2 * cos_BT1R.shape[-1]
    before, turned, after = x_BTHK[..., :start], x_BTHK[..., start:end], x_BTHK[..., end:]
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, dim=-1)
    dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    pair = a * cos_BT1R - b * sin_BT1R, b * cos_BT1R + a * sin_BT1R
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    joined = joined.to(x_BTHK.dtype)
    if joined.shape == x_BTHK.shape:
        return joined
    return torch.cat([before, joined, after], dim=-1)
