"""How rows lie in memory, for kernels that read them where they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# (tensors, rows, inner, strides): row r of tensor i begins at
# r // inner * strides[i][0] + r % inner * strides[i][1].
Rows = tuple[list[Tensor | None], int, int, list[tuple[int, int]]]


def rows_of(tensors: Sequence[Tensor | None]) -> Rows:
    """Tensors [.., D] of one shape, as rows of D that all have in the same order.

    What two strides cannot say, or a last dimension that is not dense, is copied; None stays, with
    strides 0.
    """
    given = [z if z is None or dense(z) else z.contiguous() for z in tensors]
    sizes = merged(given)
    if len(sizes) > 2:
        given = [None if z is None else z.contiguous() for z in given]
        sizes = merged(given)
    sizes = [(1, [0] * len(given))] * (2 - len(sizes)) + sizes
    (outer, outer_strides), (inner, inner_strides) = sizes
    rows = outer * inner
    if outer == 1:  # one stride: cheaper to compute with
        return given, rows, 1, [(stride, 0) for stride in inner_strides]
    return given, rows, inner, list(zip(outer_strides, inner_strides))


def dense(z: Tensor) -> bool:
    """Whether a row is read as it is."""
    return z.shape[-1] == 1 or z.stride(-1) == 1


def merged(tensors: Sequence[Tensor | None]) -> list[tuple[int, list[int]]]:
    """The leading dimensions as few as they can be: (size, a stride each)."""
    first = next(z for z in tensors if z is not None)
    found: list[tuple[int, list[int]]] = []
    for d, size in enumerate(first.shape[:-1]):
        if size == 1:
            continue
        strides = [0 if z is None else z.stride(d) for z in tensors]
        if found and all(a == size * b for a, b in zip(found[-1][1], strides)):
            found[-1] = (found[-1][0] * size, strides)
        else:
            found.append((size, strides))
    return found
