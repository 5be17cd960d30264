"""AdamW's step in one pass over parameters, gradients and moments; the gradients' norm in one."""

from llmtrain_kernels.adamw.op import (
    BACKENDS,
    adamw_step,
    cost,
    norm_cost,
    sum_of_squares,
)

__all__ = ["BACKENDS", "adamw_step", "cost", "norm_cost", "sum_of_squares"]
