"""The token stream of one source: its shards one after another, read at any place."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from llmtrain_data.shards import Shard


class TokenStream:
    """tokens: length of the stream. Row j of rows of T tokens covers [j*T, j*T + T]."""

    def __init__(self, name: str, shards: Sequence[Shard]):
        self.name = name
        self.shards = shards
        self.begins = [0, *accumulate(len(shard.tokens) for shard in shards)]
        self.tokens = self.begins[-1]

    def rows(self, seq_len: int) -> int:
        """Rows that give every token but the first as a target exactly once."""
        return max(0, -(-(self.tokens - 1) // seq_len))

    def read(self, begin: int, out_T: np.ndarray, doc_starts_T: np.ndarray) -> int:
        """Copy tokens from `begin` on into out_T, and mark there the first tokens of documents.

        doc_starts_T: bool, False before. Returns the number copied, less than asked for at the end.
        """
        end = min(begin + len(out_T), self.tokens)
        place = begin
        index = bisect_right(self.begins, begin) - 1
        while place < end:
            shard = self.shards[index]
            low = place - self.begins[index]
            high = min(low + end - place, len(shard.tokens))
            offset = place - begin
            out_T[offset : offset + high - low] = shard.tokens[low:high]
            first, last = shard.starts[:-1].searchsorted((low, high))
            if first < last:
                doc_starts_T[shard.starts[first:last] + (offset - low)] = True
            place += high - low
            index += 1
        return end - begin
