"""Batches of packed rows out of a prepared corpus, by sample number.

Row j of a source holds the tokens [j*T, j*T + T] of the source's stream: T inputs and, one further,
T targets. The last row of a source is filled up with weight 0, so every token but a stream's first
is a target exactly once an epoch. Sample i is a pure function of (fingerprint, seed, i): the
global batch is the same for every number of ranks, and resuming needs one integer.
Shapes: docs/shapes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from llmtrain_data.manifest import TOKEN_BYTES_FILE, Manifest, open_split
from llmtrain_data.shards import REPAIR

from llmtrain.data.batch import Batch
from llmtrain.data.order import EpochOrder, Order, WeightedOrder, check_weights
from llmtrain.data.permutation import derive_key
from llmtrain.data.prefetch import Prefetcher
from llmtrain.data.stream import TokenStream

__all__ = ["Batch", "Prefetcher", "TokenLoader"]

STREAM_VERSION = 1  # of the order and the packing; part of the stream's hash


class TokenLoader:
    """One split of a corpus as a sequence of samples. Make it with `open`.

    fingerprint: of the corpus. rows_per_epoch: rows of all sources. stream_hash: names the whole
    sequence of samples; two runs with equal hashes see the same tokens in the same order.
    token_bytes: int64 [O], bytes of text of each token id; vocab_size: O.
    """

    def __init__(
        self,
        streams: list[TokenStream],
        order: Order,
        *,
        seq_len: int,
        fingerprint: str,
        stream_hash: str,
        token_bytes: torch.Tensor,
        eot_id: int,
    ):
        self.streams = streams
        self.order = order
        self.seq_len = seq_len
        self.fingerprint = fingerprint
        self.stream_hash = stream_hash
        self.token_bytes = token_bytes
        self.vocab_size = len(token_bytes)
        self.eot_id = eot_id
        self.rows_per_epoch = sum(stream.rows(seq_len) for stream in streams)

    @classmethod
    def open(
        cls,
        corpus_dir: str | Path,
        split: str,
        *,
        seq_len: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> TokenLoader:
        """Open and check cheaply (sizes, headers, hashes of the manifest; the content is read by
        llmtrain_data.manifest.verify_corpus).

        weights: probability of each source, per row; None reads every row once an epoch. Raises
        ValueError for a missing, damaged or too small corpus and for weights that do not fit it.
        """
        if seq_len < 1:
            raise ValueError(f"train.seq_len={seq_len}; expected at least 1; set train.seq_len")
        manifest = Manifest.load(corpus_dir)
        opened = open_split(corpus_dir, manifest, split)
        streams = [TokenStream(name, opened[name]) for name in sorted(opened)]
        where = f"corpus {str(corpus_dir)!r}, split {split!r}"
        check_long_enough(where, streams, seq_len, each=weights is not None)
        rows_of = [stream.rows(seq_len) for stream in streams]
        identity = {"fingerprint": f"{manifest.fingerprint}/{split}", "seed": seed}
        if weights is None:
            order: Order = EpochOrder(rows_of, **identity)
            listed = []
        else:
            listed = check_weights(weights, [stream.name for stream in streams])
            order = WeightedOrder(rows_of, listed, **identity)
        parts = (STREAM_VERSION, manifest.fingerprint, split, seed, seq_len, *listed)
        return cls(
            streams,
            order,
            seq_len=seq_len,
            fingerprint=manifest.fingerprint,
            stream_hash=f"{derive_key('stream', *parts):016x}",
            token_bytes=torch.from_numpy(read_token_bytes(Path(corpus_dir), manifest)),
            eot_id=manifest.eot_id,
        )

    def batch(self, first_sample: int, rows: int) -> Batch:
        """Samples [first_sample, first_sample + rows)."""
        length = self.seq_len
        window_BT = np.full((rows, length + 1), self.eot_id, dtype=np.int64)
        starts_BT = np.zeros((rows, length + 1), dtype=bool)
        weights_BT = np.ones((rows, length), dtype=np.float32)
        sources_B, rows_B = self.order.rows(first_sample, rows)
        for index, (source, row) in enumerate(zip(sources_B.tolist(), rows_B.tolist())):
            count = self.streams[source].read(row * length, window_BT[index], starts_BT[index])
            if count <= length:  # the end of the stream: `count - 1` targets, the rest is filling
                weights_BT[index, count - 1 :] = 0
                starts_BT[index, count] = True
        return Batch(
            tokens_BT=torch.from_numpy(np.ascontiguousarray(window_BT[:, :-1])),
            targets_BT=torch.from_numpy(np.ascontiguousarray(window_BT[:, 1:])),
            weights_BT=torch.from_numpy(weights_BT),
            doc_starts_BT=torch.from_numpy(np.ascontiguousarray(starts_BT[:, :-1])),
        )

    def samples(self, first_sample: int, rows: int) -> list[tuple[str, int]]:
        """(source, row) of consecutive samples, for the ledger."""
        sources_B, rows_B = self.order.rows(first_sample, rows)
        names = [stream.name for stream in self.streams]
        return [(names[source], int(row)) for source, row in zip(sources_B, rows_B)]


def read_token_bytes(corpus: Path, manifest: Manifest) -> np.ndarray:
    """int64 [O]. Raises ValueError when the table is missing or not the vocabulary's."""
    path = corpus / TOKEN_BYTES_FILE
    try:
        lengths_O = np.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); expected the table that prep writes; {REPAIR}"
        ) from error
    if lengths_O.shape != (manifest.vocab_size,):
        raise ValueError(
            f"{path}: shape {lengths_O.shape}, expected ({manifest.vocab_size},), one number for "
            f"each token of the vocabulary; {REPAIR}"
        )
    return lengths_O.astype(np.int64)


def check_long_enough(where: str, streams: list[TokenStream], seq_len: int, *, each: bool) -> None:
    """Raises ValueError when no source (or, each: some source) fills one row."""
    pick = min if each else max
    stream = pick(streams, key=lambda stream: stream.tokens)
    if stream.tokens <= seq_len:
        which = "the shortest" if each else "the longest"
        raise ValueError(
            f"{where}: train.seq_len={seq_len}, but {which} source, {stream.name!r}, has "
            f"{stream.tokens} tokens; expected at least {seq_len + 1}; lower train.seq_len or "
            "prepare more text"
        )
