"""Head projection and cross entropy in one operation that keeps no logits.

    logits_n = cap(x_n W^T)          over the first vocab_size rows of W; cap(l) = c tanh(l / c)
    lse_n = log sum_o exp logits_no          ce_n = lse_n - logits_n[target_n]
    loss = sum_n w_n (ce_n + z lse_n^2)      w_n = 0 where target_n is ignore_index

    d logits_no = w_n (p_no (1 + 2 z lse_n) - [o = target_n]) cap'(l_no)
    dx = dlogits W          dW = dlogits^T x

Rows are taken a chunk at a time: logits by the library's matrix product into one buffer, a kernel
that turns the buffer into d logits in place, two more products. Gradients are thus made in the
forward pass, for a gradient of the loss that is known before; the backward pass multiplies them
only where it turns out to be another. 6 N D O FLOPs, as much as with all logits kept.
"""

from llmtrain_kernels.linear_cross_entropy.op import (
    BACKENDS,
    cost,
    linear_cross_entropy,
    select_backend,
)
from llmtrain_kernels.linear_cross_entropy.reference import IGNORED, HeadLoss, reference

__all__ = [
    "BACKENDS",
    "IGNORED",
    "HeadLoss",
    "cost",
    "linear_cross_entropy",
    "reference",
    "select_backend",
]
