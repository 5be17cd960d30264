"""Zeros that make key and value widths equal, for kernels that know one width only."""

from __future__ import annotations

from operator import index

import torch.nn.functional as F
from torch import Tensor

STEP = 8  # widths of the flash kernels are multiples of it


def common_width(k_width: int, v_width: int) -> int:
    """The smallest width of the flash kernels that holds both."""
    return -(-max(k_width, v_width) // STEP) * STEP


def equal_widths(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """q, k, v of one width, and the scale of the scores as it was before.

    Zeros in queries and keys change no score; those in values fill columns of the result that the
    caller cuts off. They cost FLOPs: 20% more for latent attention's 192 and 128 wide heads.
    """
    k_width, v_width = index(q_BTHK.shape[3]), index(v_BSGV.shape[3])
    width = common_width(k_width, v_width)
    if k_width == v_width == width:
        return q_BTHK, k_BSGK, v_BSGV, scale
    scale = k_width**-0.5 if scale is None else scale
    q_BTHK = F.pad(q_BTHK, (0, width - k_width))
    k_BSGK = F.pad(k_BSGK, (0, width - k_width))
    return q_BTHK, k_BSGK, F.pad(v_BSGV, (0, width - v_width)), scale
