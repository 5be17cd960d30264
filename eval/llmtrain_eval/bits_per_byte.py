"""Bits per byte: -sum log2 p over held-out tokens, divided by the bytes of text they stand for.

Independent of the tokenizer, unlike the loss per token. Tokens without text (end-of-text) cost bits
and bring no bytes. The held-out stream of a source is cut into rows as in training:

    stride = seq_len (default)   a token sees at most the tokens before it in its row
    stride < seq_len             rows overlap; a token sees seq_len - stride tokens or more, where
                                 they exist (slower by seq_len / stride)

Each token but a stream's first is predicted exactly once. The same rows go to the n-gram baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llmtrain_data.manifest import Manifest, open_split
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.data.loader import Batch
from llmtrain.data.stream import TokenStream
from llmtrain.model.language_model import LanguageModel
from llmtrain_eval import ranks
from llmtrain_eval.ngram import NAMES, Baselines
from llmtrain_eval.scoring import log_probabilities

NGRAM_TOKENS = 1 << 18  # tokens that n-grams score at once


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A source's held-out stream, and which of its rows are scored.

    rows: their numbers; row i reads the tokens [i * stride, i * stride + seq_len].
    """

    stream: TokenStream
    rows: np.ndarray
    seq_len: int
    stride: int

    def scored_tokens(self) -> int:
        """Tokens that the rows predict."""
        last = self.stream.tokens - 1
        ends = np.minimum(self.rows * self.stride + self.seq_len, last)
        begins = self.rows * self.stride + np.where(self.rows > 0, self.seq_len - self.stride, 0)
        return int((ends - begins).sum())

    def batch(self, rows: np.ndarray) -> Batch:
        """Rows as TokenLoader gives them; a token that an earlier row predicts has weight 0."""
        window_BT = np.zeros((len(rows), self.seq_len + 1), dtype=np.int64)
        starts_BT = np.zeros(window_BT.shape, dtype=bool)
        weights_BT = np.zeros((len(rows), self.seq_len), dtype=np.float32)
        for index, row in enumerate(rows.tolist()):
            begin = row * self.stride
            count = self.stream.read(begin, window_BT[index], starts_BT[index])
            weights_BT[index, : count - 1] = 1
            if row > 0:
                weights_BT[index, : self.seq_len - self.stride] = 0
        return Batch(
            tokens_BT=torch.from_numpy(window_BT[:, :-1].copy()),
            targets_BT=torch.from_numpy(window_BT[:, 1:].copy()),
            weights_BT=torch.from_numpy(weights_BT),
            doc_starts_BT=torch.from_numpy(starts_BT[:, :-1].copy()),
        )


def held_out(
    corpus: str | Path,
    *,
    seq_len: int,
    stride: int | None = None,
    split: str = "val",
    max_tokens: int | None = None,
) -> list[HeldOut]:
    """The streams of a split, one for each source.

    max_tokens: score about so many tokens, in rows spread evenly over every source.
    """
    stride = stride or seq_len
    if not 0 < stride <= seq_len:
        raise ValueError(
            f"bits_per_byte.stride: got {stride}, expected 1 to the row length of {seq_len} "
            "tokens; null means whole rows"
        )
    opened = open_split(corpus, Manifest.load(corpus), split)
    streams = [TokenStream(name, opened[name]) for name in sorted(opened)]
    total = sum(stream.tokens for stream in streams)
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / total)
    return [
        HeldOut(
            stream=stream,
            rows=spread(row_count(stream.tokens, seq_len, stride), share),
            seq_len=seq_len,
            stride=stride,
        )
        for stream in streams
    ]


def row_count(tokens: int, seq_len: int, stride: int) -> int:
    """Rows that predict every token but the first: the first row seq_len, each other stride."""
    return 1 + max(0, math.ceil((tokens - 1 - seq_len) / stride)) if tokens > 1 else 0


def spread(count: int, share: float) -> np.ndarray:
    """That share of the numbers 0 .. count - 1, at least one, at even distances; int64."""
    wanted = max(1, round(share * count)) if count else 0
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def all_batches(streams: Sequence[HeldOut], batch_tokens: int) -> list[tuple[HeldOut, np.ndarray]]:
    """(stream, rows) of every forward pass."""
    parts = []
    for one in streams:
        size = max(1, batch_tokens // one.seq_len)
        parts += [(one, one.rows[i : i + size]) for i in range(0, len(one.rows), size)]
    return parts


def bits_per_byte(
    model: LanguageModel,
    streams: Sequence[HeldOut],
    token_bytes: Tensor,
    *,
    mask_documents: bool,
    batch_tokens: int,
    done: Callable[[int], object] = lambda tokens: None,
) -> dict:
    """What the model pays for the held-out tokens, in total and by source.

    {"bits_per_byte", "bits", "bytes", "tokens", "loss" (nats a token), "sources": {name: same}}

    token_bytes: int64 [O], bytes of text of each token. mask_documents: as in training. done:
    called with the number of tokens scored. The same on every rank, for any number of ranks.
    """
    sizes = token_bytes.numpy()
    part: dict[int, tuple[str, np.ndarray]] = {}
    numbered = list(enumerate(all_batches(streams, batch_tokens)))
    for index, (one, rows) in ranks.share(numbered):
        batch = one.batch(rows)
        scored_BT = batch.weights_BT > 0
        log_p_N = score_batch(model, batch, scored_BT, mask_documents)
        targets_N = batch.targets_BT[scored_BT].numpy()
        bits = -log_p_N.sum() / math.log(2)
        part[index] = (one.stream.name, np.array([bits, sizes[targets_N].sum(), targets_N.size]))
        done(ranks.world_size() * targets_N.size)
    merged = {index: sums for one in ranks.gather(part) for index, sums in one.items()}
    ordered = [merged[index] for index in sorted(merged)]
    sources = {
        one.stream.name: summary([sums for name, sums in ordered if name == one.stream.name])
        for one in streams
    }
    return {**summary([sums for _, sums in ordered]), "sources": sources}


def of_ngrams(
    baselines: Baselines, streams: Sequence[HeldOut], model: dict, *, mask_documents: bool
) -> dict[str, dict]:
    """The same of n-gram models: name -> bits_per_byte's dict. model: the model's, whose numbers of
    bytes and tokens are those of the same rows."""
    by_source = {
        one.stream.name: baselines.bits(
            (one.batch(rows) for _, rows in all_batches([one], NGRAM_TOKENS)),
            mask_documents=mask_documents,
        )
        for one in streams
    }

    def priced(bits: float, counted: dict) -> dict:
        return summary([np.array([bits, counted["bytes"], counted["tokens"]])])

    return {
        name: {
            **priced(math.fsum(bits[name] for bits in by_source.values()), model),
            "sources": {
                source: priced(bits[name], model["sources"][source])
                for source, bits in by_source.items()
            },
        }
        for name in NAMES
    }


@torch.inference_mode()
def score_batch(
    model: LanguageModel, batch: Batch, scored_BT: Tensor, mask_documents: bool
) -> np.ndarray:
    """log p of the scored targets, float64 [N]."""
    device = model.embedding.weight.device
    if mask_documents:
        ctx = SequenceContext.packed(batch.doc_starts_BT)
    else:
        ctx = SequenceContext.dense(*batch.tokens_BT.shape)
    hidden_BTD = model(batch.tokens_BT.to(device), ctx.to(device)).hidden_BTD
    targets_N = batch.targets_BT[scored_BT].to(device)
    return log_probabilities(model, hidden_BTD[scored_BT.to(device)], targets_N)[0]


def summary(sums: Sequence[np.ndarray]) -> dict:
    """Exact totals of (bits, bytes, tokens)."""
    bits, size, tokens = (math.fsum(column) for column in zip(*sums)) if sums else (0, 0, 0)
    return {
        "bits_per_byte": per(bits, size),
        "bits": bits,
        "bytes": int(size),
        "tokens": int(tokens),
        "loss": per(bits * math.log(2), tokens),
    }


def per(total: float, count: float) -> float | None:
    return total / count if count else None
