"""The choice of a backend: which one runs a case, and why.

auto goes down the list of its situation and takes the first that can run it:

    situation                                    order
    softcap on CUDA, no cache                    flash_attn, flex, eager
    softcap elsewhere                            eager
    reading a cache                              sdpa
    CUDA, half precision, documents or window    varlen, flash_attn, flex, sdpa
    everything else                              sdpa

The flash kernels know one width: where keys and values differ (latent attention), the narrower are
padded with zeros (widths.py), which the reason says. The last resort of the first and fourth rows
computes every hidden pair, as does sdpa on CUDA in float32 with documents or a window: such choices
are logged as warnings.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import NamedTuple

from llmtrain_kernels.attention import eager, flash_attn, flex, reference, sdpa, varlen
from llmtrain_kernels.attention.case import Case

log = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "varlen": varlen,
    "flex": flex,
    "flash_attn": flash_attn,
    "eager": eager,
}


class Choice(NamedTuple):
    """backend: a key of BACKENDS. slow: it computes much that the mask hides, on a GPU."""

    backend: str
    reason: str
    slow: bool


def select_backend(case: Case, requested: str = "auto") -> Choice:
    """The backend that runs a case.

    Raises ValueError when the requested one is unknown or cannot run it.
    """
    if requested != "auto":
        if requested not in BACKENDS:
            raise ValueError(
                f"attention backend: got {requested!r}, expected auto or one of "
                f"{', '.join(BACKENDS)}; set mixer.backend"
            )
        why_not = BACKENDS[requested].unsupported(case)
        if why_not is not None:
            raise ValueError(
                f"attention backend={requested}: {why_not}; got {case.describe()}; "
                "set mixer.backend=auto"
            )
        return Choice(requested, "asked for", slow=False)
    sparse = case.documents or case.window is not None
    if case.softcap:
        if case.cache or case.device != "cuda":
            return Choice("eager", "softcap, all scores in memory", slow=False)
        return first_of(("flash_attn", "flex"), case, "caps scores", otherwise="eager")
    if case.cache:
        return Choice("sdpa", "a cache is a mask", slow=False)
    if not sparse:
        cudnn = case.half_cuda and case.training and case.capability[0] in sdpa.CUDNN_MAJORS
        padded = case.padded if case.half_cuda and case.k_width != case.v_width else ""
        reason = "dense rows" + (", cuDNN first" if cudnn else "") + padded
        return Choice("sdpa", reason, slow=False)
    if case.device != "cuda":
        return Choice("sdpa", "only backend for training on this device", slow=False)
    if not case.half_cuda:
        return Choice(
            "sdpa", "only backend for this dtype; half precision has faster ones", slow=True
        )
    return first_of(("varlen", "flash_attn", "flex"), case, "skips hidden pairs", otherwise="sdpa")


def first_of(backends: tuple[str, ...], case: Case, virtue: str, *, otherwise: str) -> Choice:
    """The first backend that can run the case, or the slow one that always can."""
    reasons = []
    for backend in backends:
        why_not = BACKENDS[backend].unsupported(case)
        if why_not is None:
            padded = "" if backend == "flex" else case.padded
            return Choice(backend, "; ".join([virtue + padded, *reasons]), slow=False)
        reasons.append(f"{backend} {why_not}")
    return Choice(otherwise, "; ".join(reasons), slow=True)


@functools.cache
def announced(case: Case, requested: str) -> str:
    """select_backend's name; the first time for a case, it is logged with its reason."""
    choice = select_backend(case, requested)
    level = logging.WARNING if choice.slow else logging.INFO
    log.log(level, "attention: %s for %s (%s)", choice.backend, case.describe(), choice.reason)
    return choice.backend
