"""The definition: all logits at once, and torch's autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target of positions that do not count


class HeadLoss(NamedTuple):
    """loss: to be differentiated, sum of w (ce + z_loss lse^2). ce_sum: of w ce; lse_square_sum: of
    w lse^2; both without gradient. Scalars in float32, float64 for float64 inputs."""

    loss: Tensor
    ce_sum: Tensor
    lse_square_sum: Tensor


def reference(
    x_ND: Tensor,
    weight_OD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORED,
    vocab_size: int | None = None,
) -> HeadLoss:
    """Arguments as linear_cross_entropy(). The product is in x's dtype, all after it in float32."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    logits_NO = F.linear(x_ND, weight_OD.to(x_ND.dtype))[:, :vocab_size].to(wide)
    if softcap is not None:
        logits_NO = softcap * torch.tanh(logits_NO / softcap)
    lse_N = logits_NO.logsumexp(dim=-1)
    known_N = (targets_N >= 0) & (targets_N < logits_NO.shape[1])
    targets_N1 = torch.where(known_N, targets_N, 0)[:, None]
    picked_N = torch.where(known_N, logits_NO.gather(1, targets_N1)[:, 0], torch.nan)
    weights_N = torch.ones_like(lse_N) if weights_N is None else weights_N.detach().to(wide)
    counts_N = (targets_N != ignore_index) & (weights_N != 0)
    ce_sum = torch.where(counts_N, weights_N * (lse_N - picked_N), 0).sum()
    lse_square_sum = torch.where(counts_N, weights_N * lse_N.square(), 0).sum()
    loss = ce_sum + z_loss * lse_square_sum if z_loss else ce_sum
    return HeadLoss(loss, ce_sum.detach(), lse_square_sum.detach())
