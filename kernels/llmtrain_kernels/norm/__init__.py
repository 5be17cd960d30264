"""Norms over the last dimension, alone, with a residual added first, or with a gate.

    rms:    n(x) = x / sqrt(mean(x^2) + eps)                            Zhang and Sennrich 2019,
    layer:  n(x) = (x - mean(x)) / sqrt(var(x) + eps)                   arXiv:1910.07467;
    y = n(x) * w (+ b), or n(x) * (1 + w) where zero_centered           Ba et al. 2016, 1607.06450
    add:    h = x + residual    y = n(h) * w (+ b)                      both returned
    gated:  y = n(x a(z)) * w   or, norm_before_gate, y = (n(x) * w) a(z)     a: silu or sigmoid

Gated as in Mamba-2 (arXiv:2405.21060, section 7.1) and gated DeltaNet (arXiv:2412.06464). The mean
is over D, the last dimension, or over each group of group_width neighbours in it; w has one number
a channel of D in either case. All in float32 (float64 stays), rounded once, but for h: it is
rounded to x's dtype, and y is the norm of what was rounded.

Gradients, with n for n(x), g = w dy and means over the same numbers as above:
    dx = (g - n mean(g n) (- mean(g), of layer)) / sqrt(..)     dw = sum of dy n     db = sum of dy
One reciprocal root a row is kept (and its mean, of layer). Gates beyond 1e4 count as 1e4.

Cost: bytes. With N numbers of s bytes: 2 N s forward and 3 N s backward; with a residual 4 N s and
4 N s (h's gradient is read too; x and residual have one gradient, one tensor); with a gate 3 N s
and 5 N s.
"""

from llmtrain_kernels.norm.op import (
    BACKENDS,
    add_layer_norm,
    add_rms_norm,
    cost,
    gated_layer_norm,
    gated_rms_norm,
    layer_norm,
    rms_norm,
    select_backend,
)
from llmtrain_kernels.norm.reference import ACTIVATIONS, GATE_LIMIT

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "GATE_LIMIT",
    "add_layer_norm",
    "add_rms_norm",
    "cost",
    "gated_layer_norm",
    "gated_rms_norm",
    "layer_norm",
    "rms_norm",
    "select_backend",
]
