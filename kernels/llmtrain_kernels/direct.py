"""Calls of an operator without its layers, where nothing traces.

torch.compile sees a custom operator as one node. Called from Python, its layers, which are Python
too, take the host as long as all beneath them but the launch: rope's forward pass 54 us with them
and 19 without (results/2026-11-30_dense_h200/host.py). So eager calls take the functions that the
operator is made of through a plain autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Call = Callable[..., Any]


def direct(
    operator: Call, forward: Call, setup_context: Call, gradients: Call, *, twice: bool = False
) -> Call:
    """A function with the operator's arguments, positional ones.

    operator: of torch.library, with its autograd registered; taken under torch.compile and dispatch
    modes (fake tensors, counters). forward: what it computes. setup_context(ctx, inputs, output),
    gradients(ctx, *of_outputs): as its autograd has them, but computing without operators. twice:
    gradients can be differentiated again; else that raises RuntimeError.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *of_outputs):
            if not twice and torch.is_grad_enabled():  # what computes records nothing
                raise RuntimeError(
                    f"{operator}: got a gradient to differentiate (create_graph=True), expected "
                    "none, since its gradients have none of their own; set backend=reference"
                )
            return gradients(ctx, *of_outputs)

    def call(*inputs):
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return operator(*inputs) if traced else Direct.apply(*inputs)

    return call
