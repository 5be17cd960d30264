"""Rows of tokens: as the loader gives them, and with their context as the model takes them.

Shapes: docs/shapes.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmtrain.context import SequenceContext


@dataclass(frozen=True, kw_only=True)
class Batch:
    """tokens_BT, targets_BT: int64. weights_BT: float32, 0 where the row is filled up.
    doc_starts_BT: bool, True at the first token of a document (and of the filling)."""

    tokens_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    doc_starts_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What the model is trained on at once: rows and what every layer may know about them."""

    tokens_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    ctx: SequenceContext

    @classmethod
    def of(cls, batch: Batch, *, mask_documents: bool) -> MicroBatch:
        """Rows packed with documents that do not see each other, or (unmasked) dense rows.

        The context's max_seqlen is the length of a row: the longest document differs from batch to
        batch, and compiled code would be made anew for it.
        """
        rows, tokens = batch.tokens_BT.shape
        if mask_documents:
            ctx = replace(SequenceContext.packed(batch.doc_starts_BT), max_seqlen=tokens)
        else:
            ctx = SequenceContext.dense(rows, tokens)
        return cls(
            tokens_BT=batch.tokens_BT,
            targets_BT=batch.targets_BT,
            weights_BT=batch.weights_BT,
            ctx=ctx,
        )

    def pinned(self) -> MicroBatch:
        """The same in page-locked memory, from which copies to a GPU do not block."""
        pinned = {
            name: value.contiguous().pin_memory()
            for name in ("positions_BT", "doc_ids_BT", "cu_seqlens")
            if (value := getattr(self.ctx, name)) is not None
        }
        return MicroBatch(
            tokens_BT=self.tokens_BT.pin_memory(),
            targets_BT=self.targets_BT.pin_memory(),
            weights_BT=self.weights_BT.pin_memory(),
            ctx=replace(self.ctx, **pinned),
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """On the device; copies from pinned memory do not block."""
        return MicroBatch(
            tokens_BT=self.tokens_BT.to(device, non_blocking=True),
            targets_BT=self.targets_BT.to(device, non_blocking=True),
            weights_BT=self.weights_BT.to(device, non_blocking=True),
            ctx=self.ctx.to(device),
        )
