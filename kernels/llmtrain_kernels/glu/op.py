"""glu(): gated linear units on one packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain_kernels import triton_backend
from llmtrain_kernels.checks import check_backend, check_choice
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.glu.fused import fused
from llmtrain_kernels.glu.reference import ACTIVATIONS, formula, reference

RUN = {"triton": fused, "torch": formula, "reference": reference}
BACKENDS = tuple(RUN)


def glu(gate_up_X2F: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """act(gate) * up, [..., F] in the dtype of gate_up.

    gate_up_X2F: [..., 2F], gate beside up in the last dimension, any leading dimensions; rows may
    be further apart than their length. activation: silu, gelu (exact) or gelu_tanh.
    backend: auto | triton | torch | reference; auto is triton on CUDA where it can run, else torch,
    which rounds the activation to the dtype of gate_up before the product.
    ValueError for an odd last dimension, an unknown name, or a backend that cannot run.
    """
    check(gate_up_X2F, activation, backend)
    chosen = select_backend(backend, gate_up_X2F.device.type, gate_up_X2F.dtype)
    return RUN[chosen](gate_up_X2F, activation=activation)


@torch.compiler.assume_constant_result
def select_backend(requested: str, device: str, dtype: torch.dtype) -> str:
    """The backend that runs. Plain values in and out: under torch.compile it runs while tracing.
    ValueError when the requested one cannot run."""
    why_not = triton_backend.unavailable(device, dtype)
    return triton_backend.select("glu", requested, device, why_not, "torch")


def check(gate_up_X2F: Tensor, activation: str, backend: str) -> None:
    """ValueError when the arguments of glu() do not fit together."""
    check_backend("glu", backend, BACKENDS)
    check_choice("glu", "activation", activation, ACTIVATIONS)
    if gate_up_X2F.shape[-1] % 2:
        raise ValueError(
            f"glu: got a last dimension of {gate_up_X2F.shape[-1]}, expected an even one, gate "
            "beside up; give the packed projection"
        )


def cost(rows: int, *, hidden: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """(forward, backward) of so many packed rows. Elementwise: no FLOPs are counted."""
    part = rows * hidden * dtype.itemsize
    forward = Cost(flops=0.0, bytes_read=2 * part, bytes_written=part, saved_bytes=2 * part)
    return forward, Cost(flops=0.0, bytes_read=3 * part, bytes_written=2 * part)
