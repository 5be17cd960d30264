"""What shapes a plan of cuDNN's attention over packed documents: sizes, rounded up so that plans
are few, and where documents begin in every tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_DOCUMENTS = 16
LEAST_TOKENS = 128
ALIGNMENT = 16  # bytes: kernels load vectors of so many
OFFSET_OF = {"do": "o", "dq": "q", "dk": "k", "dv": "v"}  # operands with the offsets of another
Numbers = tuple[Tensor, ...]  # of documents: buffers of offsets and lengths as a plan takes them


class Key(NamedTuple):
    """What shapes a plan. documents, longest, tokens: rounded up; tokens is 0 in the forward plan,
    which does not depend on it."""

    device: int
    dtype: torch.dtype
    heads: int
    groups: int
    k_width: int
    v_width: int
    documents: int
    longest: int
    causal: bool
    scale: float
    tokens: int = 0

    @property
    def backward(self) -> bool:
        return self.tokens > 0


class Operand(NamedTuple):
    """A contiguous tensor of all tokens: [B, T, heads, width]."""

    heads: int
    width: int

    @property
    def token_stride(self) -> int:
        return self.heads * self.width


def power_of_two(count: int, least: int) -> int:
    """The smallest power of two that holds count and least."""
    return 1 << (max(count, least) - 1).bit_length()


def rounded_longest(longest: int, row: int) -> int:
    """A bound of the longest document. row: tokens of a row, which no document exceeds."""
    return min(power_of_two(longest, LEAST_TOKENS), -(-row // LEAST_TOKENS) * LEAST_TOKENS)


def rounded_tokens(tokens: int) -> int:
    """At most an eighth above tokens; few values: four significant bits."""
    step = max(LEAST_TOKENS, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def make_key(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    *,
    backward: bool,
) -> Key:
    rows, row, heads, k_width = q_BTHK.shape
    return Key(
        device=q_BTHK.get_device(),
        dtype=q_BTHK.dtype,
        heads=heads,
        groups=k_BTGK.shape[2],
        k_width=k_width,
        v_width=v_BTGV.shape[3],
        documents=power_of_two(cu_seqlens.shape[0] - 1, LEAST_DOCUMENTS),
        longest=rounded_longest(longest, row),
        causal=causal,
        scale=scale,
        tokens=rounded_tokens(rows * row) if backward else 0,
    )


def operands(key: Key) -> dict[str, Operand]:
    """The tensors of a plan by name."""
    of_q, of_o = (Operand(key.heads, width) for width in (key.k_width, key.v_width))
    of_k, of_v = (Operand(key.groups, width) for width in (key.k_width, key.v_width))
    found = {"q": of_q, "k": of_k, "v": of_v, "o": of_o, "lse": Operand(key.heads, 1)}
    return found | ({"do": of_o, "dq": of_q, "dk": of_k, "dv": of_v} if key.backward else {})


def addressable(x_BTHK: Tensor) -> Tensor:
    """x, or a copy of it that is contiguous and lies where vectors can be loaded. Packed plans read
    views of one projection right, but the gradients of q and k came out wrong (cuDNN 9.19)."""
    if x_BTHK.is_contiguous() and x_BTHK.data_ptr() % ALIGNMENT == 0:
        return x_BTHK
    return x_BTHK.clone(memory_format=torch.contiguous_format)


def ragged(cu_seqlens: Tensor, documents: int, token_strides_R1: Tensor) -> Numbers:
    """R offsets, int64, of which the first N + 1 are the elements at which documents begin and the
    last ends; then, for queries and for keys, int32 lengths, of which the first N count.

    Three small kernels, and nothing that waits for the device. Offsets are N + 2, not N + 1: so
    each begins at a multiple of 16 bytes.
    """
    missing = documents + 2 - cu_seqlens.shape[0]
    ends = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(missing)])
    lengths_N = ends.diff()
    return *(ends * token_strides_R1).unbind(), lengths_N, lengths_N
