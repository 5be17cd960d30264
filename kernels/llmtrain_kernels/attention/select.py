"""The choice of a backend: which one runs a case, and why.

auto goes down a list and takes the first backend that can run the case. On CUDA the lists are in
choices/<device>.toml, by situation and class of shapes, as they were measured there:

    situation                                    list
    softcap, no cache                            [[softcap]]
    half precision, a window                     [[window]]
    half precision, documents                    [[packed]]
    rows of one document                         [[dense]]

Elsewhere softcap is eager, and all else sdpa; so is reading a cache, and, on CUDA in float32,
documents or a window.

The flash kernels know one width: where keys and values differ (latent attention), the narrower are
padded with zeros (widths.py), which the reason says. The last resort of a list of several computes
every hidden pair, as does sdpa on CUDA in float32 with documents or a window: such choices are
logged as warnings.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import NamedTuple

from llmtrain_kernels.attention import (
    choice,
    cudnn,
    eager,
    flash_attn,
    flex,
    reference,
    sdpa,
    varlen,
)
from llmtrain_kernels.attention.case import Case

log = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "varlen": varlen,
    "flex": flex,
    "flash_attn": flash_attn,
    "cudnn": cudnn,
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
    return automatic(case)


def automatic(case: Case) -> Choice:
    """What auto takes."""
    sparse = case.documents or case.window is not None
    if case.softcap:
        if case.cache or case.device != "cuda":
            return Choice("eager", "softcap, all scores in memory", slow=False)
        return first_of("softcap", case, "caps scores")
    if case.cache:
        return Choice("sdpa", "a cache is a mask", slow=False)
    if not sparse:
        return first_of("dense", case, dense_rows(case))
    if case.device != "cuda":
        return Choice("sdpa", "only backend for training on this device", slow=False)
    if not case.half_cuda:
        return Choice(
            "sdpa", "only backend for this dtype; half precision has faster ones", slow=True
        )
    return first_of("packed" if case.window is None else "window", case, "skips hidden pairs")


def dense_rows(case: Case) -> str:
    """What is said of rows of one document: whether sdpa begins with cuDNN."""
    cudnn = case.half_cuda and case.training and case.capability[0] in sdpa.CUDNN_MAJORS
    return "dense rows" + (", cuDNN first" if cudnn else "")


def first_of(situation: str, case: Case, virtue: str) -> Choice:
    """The first backend of the device's list that can run the case; the last always can."""
    order = choice.order(case.table, situation, tokens=case.tokens, k_width=case.k_width)
    reasons = []
    for backend in order:
        why_not = BACKENDS[backend].unsupported(case)
        last_resort = backend == order[-1] and len(order) > 1
        if why_not is None and not last_resort:
            said = virtue + padding(situation, backend, case)
            return Choice(backend, "; ".join([said, *reasons]), slow=False)
        reasons.append(f"{backend} {why_not}")
    return Choice(order[-1], "; ".join(reasons[:-1]), slow=True)


def padding(situation: str, backend: str, case: Case) -> str:
    """A note on widths that are made equal, or ""."""
    if backend in ("flex", "cudnn") or (situation == "dense" and not differs(case)):
        return ""
    return case.padded


def differs(case: Case) -> bool:
    """Whether sdpa pads dense rows: as sdpa.pads() has it."""
    return case.half_cuda and case.k_width != case.v_width


@functools.cache
def announced(case: Case, requested: str) -> str:
    """select_backend's name; the first time for a case, it is logged with its reason."""
    choice = select_backend(case, requested)
    level = logging.WARNING if choice.slow else logging.INFO
    log.log(level, "attention: %s for %s (%s)", choice.backend, case.describe(), choice.reason)
    return choice.backend
