"""What a call from Python takes the host, through an operator's layers and past them (direct.py).

    python host.py          (a minute, CPU)

Kernels are put out of action, so that what is left is Python's: checks, tables, memory, autograd.
Microseconds a call, the least of seven means.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

import torch

CALLS = 400


class Nothing:
    """A kernel that launches nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


def fused(name: str) -> object:
    """An operation's fused.py, its kernels put out of action."""
    kernels = importlib.import_module(f"llmtrain_kernels.{name}.kernels")
    for kernel in [key for key in vars(kernels) if key.endswith("_kernel")]:
        setattr(kernels, kernel, Nothing())
    return importlib.import_module(f"llmtrain_kernels.{name}.fused")


def microseconds(call: Callable[[], object]) -> float:
    means = []
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - began) / CALLS * 1e6)
    return min(means[1:])


def main() -> None:
    torch.set_num_threads(1)
    x, gate_up = torch.randn(8, 64), torch.randn(8, 128)
    rows, taps = torch.randn(2, 8, 64), torch.randn(64, 4)
    q, k, angles = torch.randn(1, 8, 4, 64), torch.randn(1, 8, 2, 64), torch.randn(1, 8, 32)
    weight = torch.ones(64)
    norm, glu, conv, rope = (fused(name) for name in ("norm", "glu", "causal_conv", "rope"))
    options = (1e-6, 64, *(False,) * 4, True)
    cases = {
        "norm": (norm.forward, norm.call, (x, None, None, weight, None, *options), (x, weight)),
        "glu": (glu.forward, glu.call, (gate_up, "silu"), (gate_up,)),
        "causal_conv": (
            *(conv.forward, conv.call),
            (rows, taps, None, None, None, True, False),
            (rows, taps),
        ),
        "rope": (rope.turned, rope.turn, (q, k, angles, angles, False, 0, 0, False), (q, k)),
    }
    for name, (operator, direct, arguments, leaves) in cases.items():
        for leaf in leaves:
            leaf.requires_grad_()
        for label, call in (("operator", operator), ("direct", direct)):

            def forward(call=call, arguments=arguments) -> object:
                return call(*arguments)

            def both(forward=forward, leaves=leaves) -> object:
                made = forward()
                made = made if isinstance(made, tuple) else (made,)
                made = made[: 2 if len(leaves) == 2 and leaves[0].dim() == 4 else 1]
                return torch.autograd.grad(made, leaves, [torch.ones_like(y) for y in made])

            print(
                f"{name:12} {label:9} forward {microseconds(forward):6.1f}"
                f"   with backward {microseconds(both):6.1f}"
            )


if __name__ == "__main__":
    main()
