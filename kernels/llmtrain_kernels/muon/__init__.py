"""What Muon does beside matrix products: momentum, x x^T by halves, and the update of weights."""

from llmtrain_kernels.muon.iteration import (
    COEFFICIENTS,
    EPS,
    iteration_cost,
    newton_schulz,
    one_by_one,
)
from llmtrain_kernels.muon.op import (
    apply_updates,
    cost,
    momentum_step,
    symmetric_cost,
    symmetric_matmul,
)

__all__ = [
    "COEFFICIENTS",
    "EPS",
    "apply_updates",
    "cost",
    "iteration_cost",
    "momentum_step",
    "newton_schulz",
    "one_by_one",
    "symmetric_cost",
    "symmetric_matmul",
]
