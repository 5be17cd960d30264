"""What Muon does beside matrix products: momentum, x x^T by halves, and the update of weights."""

from llmtrain_kernels.muon.op import (
    apply_updates,
    cost,
    momentum_step,
    symmetric_cost,
    symmetric_matmul,
)

__all__ = ["apply_updates", "cost", "momentum_step", "symmetric_cost", "symmetric_matmul"]
