"""SequenceContext: what every layer may know about the rows of a batch, built once per batch.

Rows are independent sequences. Inside a row several documents may be packed one after another; no
layer may let information cross a document boundary (attention, scans, convolutions alike).
Shapes: docs/shapes.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotation angles of every token; built by the position module, applied by mixers.

    cos_BTR, sin_BTR: float32 [B or 1, T, R], R = half of the width that is turned.
    interleaved: pairs are (0,1),(2,3).. if True, (i, i+R) if False (the Llama layout).
    """

    cos_BTR: Tensor
    sin_BTR: Tensor
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class SequenceContext:
    """One per batch, frozen.

    positions_BT: int64 [B, T], position of a token in its document (in its row, for dense rows).
    doc_ids_BT: int32 [B, T], index of the document inside its row; None when every row is one
        document (dense), so that layers can take their unmasked path.
    cu_seqlens: int32 [N+1] on the device, cumulative document lengths over the flattened B*T
        tokens; every row start is a boundary. Padded at the end with B*T (empty documents) to a
        power of two, so that compiled code sees few shapes. None when dense.
    max_seqlen: the longest document in the batch (host int), an upper bound of T when dense.
    prefix_tokens: number of tokens already in the state, the same for every row (host int);
        0 for a fresh sequence.
    rotary: width of a rotated head part -> its angles, for every rotary_width among the model's
        mixers; set by the position module when it is rotary, else None.
    repeats, noise_seeds_B: what a stack of recurrent depth drew for this micro-batch in training:
        its number of iterations (host int) and the seeds of its first latents (int64 [B]), or None.
    """

    positions_BT: Tensor
    doc_ids_BT: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int
    prefix_tokens: int = 0
    rotary: dict[int, Rotary] | None = None
    repeats: int | None = None
    noise_seeds_B: Tensor | None = None

    @classmethod
    def dense(
        cls, batch: int, tokens: int, *, device: torch.device | str = "cpu", prefix_tokens: int = 0
    ) -> SequenceContext:
        """Rows of one document each: [batch, tokens], starting at position prefix_tokens."""
        positions_T = torch.arange(prefix_tokens, prefix_tokens + tokens, device=device)
        return cls(
            positions_BT=positions_T.expand(batch, tokens),
            max_seqlen=tokens,
            prefix_tokens=prefix_tokens,
        )

    @classmethod
    def packed(cls, doc_starts_BT: Tensor) -> SequenceContext:
        """Rows of several documents.

        doc_starts_BT: bool [B, T] on the host, True at the first token of each document; the first
        token of a row always starts one. Use .to(device) afterwards.
        """
        starts_BT = doc_starts_BT.clone()
        starts_BT[:, 0] = True
        batch, tokens = starts_BT.shape
        doc_ids_BT = starts_BT.cumsum(dim=1, dtype=torch.int32) - 1
        index_BT = torch.arange(tokens).expand(batch, tokens)
        start_index_BT = torch.where(starts_BT, index_BT, 0).cummax(dim=1).values
        starts_N = starts_BT.flatten().nonzero().flatten().to(torch.int32)
        total = batch * tokens
        lengths_N = torch.diff(starts_N, append=torch.tensor([total], dtype=torch.int32))
        size = 1 << max(6, int(starts_N.numel()).bit_length())  # > N, so the last entry is total
        cu_seqlens = torch.full((size + 1,), total, dtype=torch.int32)
        cu_seqlens[: starts_N.numel()] = starts_N
        return cls(
            positions_BT=index_BT - start_index_BT,
            doc_ids_BT=doc_ids_BT,
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths_N.max()),
        )

    @property
    def is_dense(self) -> bool:
        return self.cu_seqlens is None

    def to(self, device: torch.device | str) -> SequenceContext:
        """The same context with its tensors on device (non-blocking copies)."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("positions_BT", "doc_ids_BT", "cu_seqlens", "noise_seeds_B")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def with_rotary(self, rotary: dict[int, Rotary] | None) -> SequenceContext:
        return replace(self, rotary=rotary)
