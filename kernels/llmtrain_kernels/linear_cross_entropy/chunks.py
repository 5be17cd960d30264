"""How many rows a chunk has, in how many parts the product for dx is cut, and what time to expect.

A chunk of C rows costs, beside its products, two passes over its logits (read, gradient written)
and, from the second chunk on, reading and writing the sum of dW once: O D 8 bytes in float32
whatever C is. So chunks are as large as the memory for logits allows, and of equal size.
"""

from __future__ import annotations

import math

TILE = (128, 256)  # rows and columns of a product that a processor works on at a time
LOGITS_BYTES = 256 * 2**20  # of the buffer, when nothing else is said and the weight is no larger
ALIGNED = 64  # elements: rows of logits begin at multiples of it


def row_stride(columns: int) -> int:
    """Elements from a row of logits to the next."""
    return -(-columns // ALIGNED) * ALIGNED


def logits_limit(columns: int, width: int, weight_itemsize: int) -> int:
    """Bytes for the logits. With a float32 weight at least half of its bytes: the sum of dW, as
    large as the weight, is then read and written so seldom that it costs little, and the weight's
    copy in lower precision takes as much anyway."""
    half = columns * width * weight_itemsize // 2
    return max(LOGITS_BYTES, half) if weight_itemsize >= 4 else LOGITS_BYTES


def most_rows(columns: int, itemsize: int, limit: int = LOGITS_BYTES) -> int:
    """The largest multiple of a tile's rows whose logits fit; at least a tile."""
    return max(limit // (row_stride(columns) * itemsize) // TILE[0], 1) * TILE[0]


def rows_per_chunk(rows: int, columns: int, itemsize: int, limit: int = LOGITS_BYTES) -> int:
    """As few chunks as fit, of equal size up to a tile."""
    chunks = -(-rows // most_rows(columns, itemsize, limit))
    equal = -(-rows // max(chunks, 1))
    return max(min(-(-equal // TILE[0]) * TILE[0], rows), 1)


def parts_of_sum(rows: int, width: int, columns: int, processors: int) -> int:
    """dx [rows, width] has few tiles and sums over all columns: in how many parts to cut that sum,
    so that every processor has work. 1 unless more are clearly better."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(width / TILE[1])

    def busy(parts: int) -> float:
        rounds = math.ceil(tiles * parts / processors)
        return tiles * parts / (rounds * processors)

    able = [parts for parts in (1, 2, 3, 4) if columns % (8 * parts) == 0] or [1]
    return next((parts for parts in able if busy(parts) > 0.85), max(able, key=busy))


def predicted_ms(
    rows: int,
    width: int,
    columns: int,
    *,
    chunk_rows: int,
    float32_weight: bool = False,
    wide_sum: bool = True,
    flops_per_second: float = 700e12,
    bytes_per_second: float = 3.0e12,
    overlap: float = 0.5,
    passes: float = 2.2,
) -> float:
    """Forward and backward in bfloat16. overlap: the share of the traffic for the sum of dW that
    its product hides, where it takes no longer than that. passes: over the logits, to memory."""
    chunks = math.ceil(rows / chunk_rows)
    product = 2 * rows * width * columns / flops_per_second
    logits = passes * 2 * rows * columns / bytes_per_second
    traffic = (chunks - 1) * columns * width * (8 if wide_sum else 4) / bytes_per_second
    exposed = traffic - min(overlap * traffic, product)
    weight = columns * width * (6 if float32_weight else 0) / bytes_per_second
    return 1e3 * (3 * product + logits + exposed + weight)
