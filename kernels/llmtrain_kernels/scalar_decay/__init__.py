"""Linear recurrence whose state decays by one number a head: one function, backends, cost."""

from llmtrain_kernels.scalar_decay.op import BACKENDS, cost, scalar_decay

__all__ = ["BACKENDS", "cost", "scalar_decay"]
