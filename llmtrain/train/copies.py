"""Copies of the weights in the dtype that products are computed in, made once a step.

A layer casts its float32 weight for every micro-batch, and once more where the backward pass casts
again rather than keep the result: 6 bytes of traffic a parameter each time. The weights change once
a step, so the copies are made at its start, into memory that stays (2 bytes a parameter, which the
cast weights would take during the step as well). The products see the same numbers.

At ZeRO-3 there are no whole weights to copy between the steps.
"""

from __future__ import annotations

import logging

import torch
from llmtrain_kernels import float8
from llmtrain_kernels.float8 import Quantised, QuantisedWeight, quantise_weight
from torch import Tensor, nn

from llmtrain.model.linear import Linear

log = logging.getLogger(__name__)

# Narrower layers gain nothing from float8, and are the gates and decays of recurrent mixers.
NARROWEST = 128


def block_linears(module: nn.Module) -> dict[str, Linear]:
    """Name -> layer, of the layers in the model's blocks that compute as Linear does: not the head,
    and no router, which computes in float32."""
    blocks = [block for name, block in module.named_modules() if name.endswith("stack.blocks")]
    inside = {id(child) for block in blocks for child in block.modules()}
    return {
        name: child
        for name, child in module.named_modules()
        if id(child) in inside
        and isinstance(child, Linear)
        and type(child).forward is Linear.forward
    }


def use_float8(module: nn.Module, scaling: str, *, backend: str = "scaled_mm") -> int:
    """Let the layers that are wide enough compute in float8; gives their number. ValueError when
    there is none."""
    found = block_linears(module)
    fitting = {
        name: linear
        for name, linear in found.items()
        if min(linear.weight.shape) >= NARROWEST
        and not any(width % float8.MULTIPLE for width in linear.weight.shape)
    }
    if not fitting:
        raise ValueError(
            f"train.precision=fp8: none of {len(found)} linear layers in the blocks has widths of "
            f"at least {NARROWEST} that are multiples of {float8.MULTIPLE}, expected some; set "
            "train.precision=bf16 or a wider model"
        )
    for linear in fitting.values():
        linear.float8, linear.float8_backend = scaling, backend
    return len(fitting)


class WeightCopies:
    """The copies of a module's linear layers, in memory of their own.

    dtype: of the activations; no copies where weights have it already. refresh() takes the weights
    as they are.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.linears = [
            linear for linear in block_linears(module).values() if linear.weight.dtype != dtype
        ]
        self.plain = [linear for linear in self.linears if linear.float8 is None]
        for linear in self.plain:
            linear.weight_copy = static(torch.empty_like(linear.weight.data, dtype=dtype))
        self.quantised = [linear for linear in self.linears if linear.float8 is not None]
        for linear in self.quantised:
            made = quantise_weight(linear.weight.data, linear.float8)
            linear.quantised = QuantisedWeight(*(Quantised(*map(static, part)) for part in made))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights. To be called before they are used, after they changed."""
        if self.plain:
            copies = [linear.weight_copy for linear in self.plain]
            torch._foreach_copy_(copies, [linear.weight.data for linear in self.plain])
        for linear in self.quantised:
            quantise_weight(linear.weight.data, linear.float8, out=linear.quantised)

    def remove(self) -> None:
        for linear in self.linears:
            linear.weight_copy = linear.quantised = None


def static(tensor: Tensor) -> Tensor:
    """Promise torch.compile that the tensor stays where it is, as a parameter does."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor
