"""Gated linear units on one packed projection.

    gate, up = gate_up[:F], gate_up[F:]        y = act(gate) * up

    act = silu       g sigmoid(g)                                SwiGLU
          gelu       g (1 + erf(g / sqrt(2))) / 2                GeGLU
          gelu_tanh  g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3))

Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415. The packed row is read
where the projection wrote it, and its gradient is written in the same layout: no halves are copied
apart or put together. The backward pass forms the activation again from the packed row, the only
thing that is kept. In float32 (float64 stays), rounded once.

Cost: 3 F numbers a row moved forward, 5 F backward.
"""

from llmtrain_kernels.glu.op import BACKENDS, cost, glu, select_backend
from llmtrain_kernels.glu.reference import ACTIVATIONS, reference

__all__ = ["ACTIVATIONS", "BACKENDS", "cost", "glu", "reference", "select_backend"]
