"""Linear recurrence that corrects its state along each key: one function, backends, cost."""

from llmtrain_kernels.delta_rule.op import BACKENDS, cost, gated_delta_rule

__all__ = ["BACKENDS", "cost", "gated_delta_rule"]
