"""Case: the facts of a call that decide which backend can run it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmtrain_kernels.attention.widths import common_width


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hashable, made of plain values, so that a choice is testable without the device.

    capability: compute capability of the CUDA device, (9, 0) for an H100; None elsewhere.
    table: whose choices hold, a stem of choices/*.toml. tokens: the smallest bound of that table
    that holds a row, None if there is none.
    documents: rows hold several documents; boundaries: cu_seqlens and max_seqlen are given too.
    sinks: keys at the start of a document that a window does not hide. softcap: scores are capped.
    cache: queries and keys carry positions. training: gradients will be asked for.
    deterministic: torch is told to use nothing else.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    heads: int
    kv_heads: int
    k_width: int
    v_width: int
    causal: bool = True
    window: int | None = None
    sinks: int = 0
    softcap: bool = False
    documents: bool = False
    boundaries: bool = False
    cache: bool = False
    training: bool = False
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    table: str = "default"
    tokens: int | None = None

    @property
    def half_cuda(self) -> bool:
        """bfloat16 or float16 on CUDA: what the flash kernels are made for."""
        return self.device == "cuda" and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def padded(self) -> str:
        """A note for kernels that know one width only: "", or what equal_widths does."""
        width = common_width(self.k_width, self.v_width)
        if self.k_width == self.v_width == width:
            return ""
        return f", widths {self.k_width} and {self.v_width} padded to {width}"

    def describe(self) -> str:
        """One phrase for the log, such as "cuda bfloat16, heads 16/4 x 64, training"."""
        parts = [
            f"{self.device} {str(self.dtype).removeprefix('torch.')}",
            f"heads {self.heads}/{self.kv_heads} x {self.k_width}",
        ]
        if self.documents:
            parts.append("packed documents")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.sinks:
            parts.append(f"sinks {self.sinks}")
        if self.softcap:
            parts.append("softcap")
        if self.cache:
            parts.append("cache")
        parts.append("training" if self.training else "inference")
        return ", ".join(parts)


def flash_unsupported(case: Case) -> str | None:
    """Why the FlashAttention-2 kernels cannot run this, whichever package wraps them."""
    if not case.half_cuda:
        return "needs bfloat16 or float16 on CUDA"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs compute capability 8.0, this device has {case.capability}"
    if common_width(case.k_width, case.v_width) > 256:
        return f"needs key and value widths of at most 256, not {case.k_width} and {case.v_width}"
    if case.cache:
        return "takes no mask, so it cannot read a cache"
    if case.sinks:
        return "takes no mask, so it cannot show sinks beside a window"
    if case.documents and not case.boundaries:
        return "needs cu_seqlens and max_seqlen for packed documents"
    return None
