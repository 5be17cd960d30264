"""A bounded, deterministic sample of text for training a tokenizer.

Documents are cut into chunks, each chunk gets a pseudo-random key from its document's content and
its place in it, and the chunks with the smallest keys are kept, up to a budget of bytes. So memory
is bounded, long documents do not crowd out short ones, and the sample depends neither on the
order of the documents nor on how many processes read them.
"""

from __future__ import annotations

import hashlib
import heapq

CHUNK_CHARS = 1 << 16


class Sample:
    """Add documents, then take `texts`. budget: bytes of UTF-8 to keep."""

    def __init__(self, budget: int):
        self.budget = budget
        self.bytes = 0
        self._heap: list[tuple[int, str, int]] = []  # (-key, chunk, its bytes), largest key first
        self._limit = 1 << 64  # keys from here on were crowded out, for good

    def add(self, content: bytes, text: str) -> None:
        """content: the digest of the document; text: the document."""
        for index, start in enumerate(range(0, len(text), CHUNK_CHARS)):
            seed = hashlib.blake2b(content + index.to_bytes(8, "little"), digest_size=8)
            key = int.from_bytes(seed.digest(), "little")
            if key >= self._limit:
                continue
            chunk = text[start : start + CHUNK_CHARS]
            size = len(chunk.encode("utf-8"))
            heapq.heappush(self._heap, (-key, chunk, size))
            self.bytes += size
            while self.bytes > self.budget:
                largest, _, dropped = heapq.heappop(self._heap)
                self.bytes -= dropped
                self._limit = -largest

    @property
    def texts(self) -> list[str]:
        """The chunks in the order of their keys."""
        return [chunk for _, chunk, _ in sorted(self._heap, reverse=True)]
