"""Causal depthwise convolution: every channel sees its own last W tokens.

    y_t = act(bias + sum_{j=0}^{W-1} weight[:, W-1-j] * x_{t-j})    x_{t-j} in t's document, else 0

The short convolution before a recurrence (Poli et al. 2023, arXiv:2302.10866, section 3.1; Gu and
Dao 2023, arXiv:2312.00752, section 3.4). weight[:, -1] is the gain of the current token. Products
are summed in float32 (float64 stays) and rounded once.

Cost: W multiply-adds a channel and token, memory-bound; they are no matrix products and a mixer's
FLOPs leave them out, as they do norms. State: the last W - 1 inputs.
"""

from llmtrain_kernels.causal_conv.chunked import chunked
from llmtrain_kernels.causal_conv.fused import fused
from llmtrain_kernels.causal_conv.op import (
    ACTIVATIONS,
    BACKENDS,
    causal_conv,
    cost,
    select_backend,
)
from llmtrain_kernels.causal_conv.reference import reference

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "causal_conv",
    "chunked",
    "cost",
    "fused",
    "reference",
    "select_backend",
]
