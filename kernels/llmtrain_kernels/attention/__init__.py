"""Softmax attention: one function, several backends, their choice and their cost."""

from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.costs import cost, visible_pairs
from llmtrain_kernels.attention.op import attention
from llmtrain_kernels.attention.select import BACKENDS, Choice, select_backend

__all__ = [
    "BACKENDS",
    "Case",
    "Choice",
    "attention",
    "cost",
    "select_backend",
    "visible_pairs",
]
