"""Encoding documents in worker processes, results in the order of the input.

The parent reads documents and cuts them into segments; batches of segments go to the workers, which
send back arrays of token ids. What a document becomes depends neither on the batches nor on the
number of workers.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection

import numpy as np
from tokenizers import Tokenizer

from llmtrain_data.shards import token_dtype
from llmtrain_data.tokenizer import load_tokenizer, vocab_span

# `tokenizers` needs about 110 bytes of memory a byte of text while it encodes.
SEGMENT_CHARS = 1 << 20
BATCH_CHARS = 1 << 19
IN_FLIGHT = 3  # batches a worker has running or waiting
LINE_START = re.compile(r"\n(?=\S)")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A document or, of a long one, a part.

    bytes: of its UTF-8. target: the split and source it goes to. content: digest of the whole
    document on its first part, None on later parts.
    """

    text: str
    bytes: int
    target: tuple[str, str]
    content: bytes | None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    segment: Segment
    tokens_T: np.ndarray


def cut(text: str, limit: int = SEGMENT_CHARS) -> list[str]:
    """The text in parts of at most limit characters, cut where a line starts without a blank.

    There the split pattern of `Bpe` always ends a piece, so the parts' tokens are those of the
    whole; a text without such a place within limit is cut anyway.
    """
    parts = []
    start = 0
    while len(text) - start > limit:
        ends = [match.end() for match in LINE_START.finditer(text, start, start + limit)]
        end = ends[-1] if ends else start + limit
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return parts


def batches(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Consecutive segments, in lists of BATCH_CHARS or more (the last may have fewer)."""
    batch: list[Segment] = []
    chars = 0
    for segment in segments:
        batch.append(segment)
        chars += len(segment.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encode_segments(
    segments: Iterable[Segment], *, tokenizer_path: str, tokenizer_sha256: str, workers: int
) -> Iterator[Encoded]:
    """Encode in `workers` processes (1: in this one). Yields in the order of the segments.

    Raises ValueError when a worker dies.
    """
    encode = functools.partial(encode_texts, tokenizer_path, tokenizer_sha256)
    if workers == 1:
        for batch in batches(segments):
            yield from join(batch, encode([item.text for item in batch]))
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )
    running: deque = deque()
    try:
        for batch in batches(segments):
            texts = [item.text for item in batch]
            running.append((batch, pool.submit(encode, texts)))
            if len(running) >= IN_FLIGHT * workers:
                done, future = running.popleft()
                yield from join(done, future.result())
        while running:
            done, future = running.popleft()
            yield from join(done, future.result())
    except BrokenProcessPool as error:
        raise ValueError(
            f"prep: one of {workers} tokenizing processes died (most often: killed for memory); "
            "set data.workers lower and run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def join(batch: list[Segment], result: tuple[np.ndarray, np.ndarray]) -> Iterator[Encoded]:
    tokens_T, ends_N = result
    for segment, part_T in zip(batch, np.split(tokens_T, ends_N[:-1]), strict=True):
        yield Encoded(segment=segment, tokens_T=part_T)


@functools.lru_cache(maxsize=1)
def cached_tokenizer(path: str, sha256: str) -> tuple[Tokenizer, np.dtype]:
    """One tokenizer a process; the hash keeps a file that was replaced apart."""
    tokenizer = load_tokenizer(path)
    return tokenizer, token_dtype(vocab_span(tokenizer))


def encode_texts(path: str, sha256: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all texts one after another, and where each ends."""
    tokenizer, dtype = cached_tokenizer(path, sha256)
    # One text a call: no threads, as the processes already use the cores. The "fast" variant does
    # not compute offsets.
    encoded = [
        tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in texts
    ]
    ends_N = np.cumsum([len(ids) for ids in encoded])
    tokens_T = np.empty(ends_N[-1], dtype=dtype)
    for end, ids in zip(ends_N, encoded, strict=True):
        tokens_T[end - len(ids) : end] = ids
    return tokens_T, ends_N


def start_worker() -> None:
    """Leave Ctrl-C to the parent, use one thread, and end when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
