"""What every operation with Triton kernels asks: can they run here, and is that what is wanted?

Triton itself is imported by the files that hold kernels alone, so that references and the torch
backends work without it.
"""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: str, *dtypes: torch.dtype) -> str | None:
    """Why no Triton kernel can run on this type of device with these dtypes, or None."""
    if not HAS_TRITON:
        return "triton is not installed; pip install triton"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"they run on cuda, not {device}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"they take float32, bfloat16 and float16, not {str(dtype).split('.')[-1]}"
    return None


def select(operation: str, requested: str, device: str, why_not: str | None, other: str) -> str:
    """The backend that runs: "triton", or `other` where it cannot and was not asked for by name.

    requested: auto, triton, or a backend that always can. Plain values in and out, so that it may
    run while torch.compile traces (torch.compiler.assume_constant_result). ValueError when triton
    is requested and cannot run.
    """
    if requested not in ("auto", "triton"):
        return requested
    if requested == "triton" and why_not is not None:
        raise ValueError(
            f"{operation}: got backend='triton', expected one that can run, as of its kernels "
            f"{why_not}; set backend to auto or {other}"
        )
    return "triton" if requested == "triton" else automatic(operation, device, why_not, other)


@functools.cache
def automatic(operation: str, device: str, why_not: str | None, other: str) -> str:
    """What auto takes; the first time for a situation, it is logged with its reason."""
    on_gpu = device == "cuda"
    chosen = "triton" if on_gpu and why_not is None else other
    level = logging.WARNING if on_gpu and chosen == other else logging.INFO
    reason = "fused" if chosen == "triton" else why_not or "made for a GPU"
    logging.getLogger(__name__).log(level, "%s: %s on %s (%s)", operation, chosen, device, reason)
    return chosen
