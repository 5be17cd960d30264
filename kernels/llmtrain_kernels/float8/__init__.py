"""A linear layer whose three products run in float8, scaled anew at every call.

    quantise   s = max_8 / amax(x),  x8 = round(s x)      amax over the tensor, or over what a
               x = x8 / s                                 product sums (rowwise)
    forward    y  = x  W^T     x, W in e4m3 (4 bits of exponent, 3 of mantissa, up to 448)
    backward   dx = dy W       dy in e5m2 (5 bits, 2 bits, up to 57344): gradients spread wider
               dW = dy^T x

Micikevicius et al. 2022, arXiv:2209.05433. Products accumulate in float32; y and dx come in the
dtype of x, dW in that of W. Tensor cores want both factors laid out along what they sum over, so
every factor is quantised in two layouts; with one scale a tensor the second is the first transposed
(on a GPU one kernel writes both from one read, after the pass that finds amax), with rowwise scales
it is rounded by itself.

Saved for the backward pass: x8 in its second layout (1 byte an element; rowwise: x), and the
weight's second layout.
Widths and numbers of tokens are multiples of 16, as cuBLAS wants.
"""

from llmtrain_kernels.float8.op import (
    BACKENDS,
    CAPABILITY,
    MULTIPLE,
    cost,
    float8_linear,
    product,
    unavailable,
)
from llmtrain_kernels.float8.quantise import (
    E4M3,
    E5M2,
    SCALINGS,
    Quantised,
    QuantisedWeight,
    both_layouts,
    quantise,
    quantise_weight,
)

__all__ = [
    "BACKENDS",
    "CAPABILITY",
    "E4M3",
    "E5M2",
    "MULTIPLE",
    "SCALINGS",
    "Quantised",
    "QuantisedWeight",
    "both_layouts",
    "cost",
    "float8_linear",
    "product",
    "quantise",
    "quantise_weight",
    "unavailable",
]
