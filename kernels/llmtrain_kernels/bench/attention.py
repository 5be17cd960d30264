"""Causal attention: what auto takes, beside every way that may be faster.

Rows of one document, and rows packed with documents of random lengths. A packed row is to take no
more than 1.1 times the dense row of its shape. Ours gets what the trainer gives it: boundaries
filled up to a power of two, and the length of a row as that of the longest document. Peers that
know better numbers, or keep a block mask, show what knowing them is worth.

The reference is the sum written out in float64, one head after the other and once more for its
gradient: the loop over tokens would keep 100 GB at 16384 tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from llmtrain_kernels.attention import attention, cost
from llmtrain_kernels.bench.case import Call, Case

LEAST_BOUNDARIES = 64
WHOLE = 10**9  # a mean length that no row reaches


@dataclass(frozen=True, kw_only=True)
class Shape:
    """mean_document: average length of packed documents, None for dense rows."""

    batch: int
    tokens: int
    heads: int
    groups: int
    width: int
    mean_document: int | None = None

    def __str__(self) -> str:
        text = f"B{self.batch} T{self.tokens} H{self.heads}/{self.groups} K{self.width}"
        if not self.mean_document:
            return text
        length = "a row" if self.mean_document == WHOLE else str(self.mean_document)
        return f"{text} documents of {length}"


DENSE = [
    Shape(batch=4, tokens=4096, heads=16, groups=16, width=128),
    Shape(batch=1, tokens=16384, heads=32, groups=8, width=128),
    Shape(batch=32, tokens=1024, heads=12, groups=4, width=64),
]
# mean documents of DENSE's shapes
PACKED = {0: (512, 2048, WHOLE), 1: (512, 2048), 2: (500, WHOLE)}
QUICK = Shape(batch=2, tokens=19, heads=4, groups=2, width=8)


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(QUICK), case(replace(QUICK, mean_document=7))]
    packed = [
        replace(DENSE[i], mean_document=mean) for i, means in PACKED.items() for mean in means
    ]
    return [case(shape) for shape in (*DENSE, *packed)]


def case(shape: Shape) -> Case:
    starts = boundaries(shape)
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    return Case(
        kernel="attention",
        shape=str(shape),
        make=functools.partial(make, shape),
        ours=functools.partial(auto, shape.tokens),
        reference=exact,
        costs=cost(
            lengths,
            heads=shape.heads,
            kv_heads=shape.groups,
            k_width=shape.width,
            v_width=shape.width,
            dtype=torch.bfloat16,
        ),
        peers=packed_peers(shape, max(lengths)) if shape.mean_document else dense_peers(shape),
    )


def boundaries(shape: Shape) -> list[int]:
    """Where documents of the flattened rows begin, and the end of the last. On the host."""
    generator = torch.Generator().manual_seed(0)
    starts_BT = torch.zeros(shape.batch, shape.tokens, dtype=torch.bool)
    if shape.mean_document:
        starts_BT = torch.rand(starts_BT.shape, generator=generator) < 1 / shape.mean_document
    starts_BT[:, 0] = True
    return [*starts_BT.flatten().nonzero().flatten().tolist(), shape.batch * shape.tokens]


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def noise(heads: int) -> Tensor:
        size = (shape.batch, shape.tokens, heads, shape.width)
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

    given = {"q": noise(shape.heads), "k": noise(shape.groups), "v": noise(shape.groups)}
    if shape.mean_document:
        known = boundaries(shape)
        starts = torch.zeros(shape.batch * shape.tokens, dtype=torch.int32)
        starts[known[:-1]] = 1
        ids_BT = starts.cumsum(0, dtype=torch.int32).view(shape.batch, shape.tokens)
        filled = max(LEAST_BOUNDARIES, 1 << len(known).bit_length())
        padded = F.pad(torch.tensor(known), (0, filled + 1 - len(known)), value=known[-1])
        given["doc_ids_BT"] = ids_BT.to(device)
        given["cu_seqlens"] = padded.int().to(device)
    return given


def auto(
    tokens: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """As the trainer calls it: auto takes other kernels where no gradient is asked for."""
    longest = None if cu_seqlens is None else tokens
    packed = {"doc_ids_BT": doc_ids_BT, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
    with torch.enable_grad():
        return attention(q, k, v, **packed, backend=backend)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Head by head, each computed again for its gradient."""
    call = functools.partial(attention, doc_ids_BT=doc_ids_BT, backend="eager")
    shared = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        g = h // shared
        one = (q[:, :, h : h + 1], k[:, :, g : g + 1], v[:, :, g : g + 1])
        heads.append(checkpoint(call, *one, use_reentrant=False))
    return torch.cat(heads, dim=2)


def dense_peers(shape: Shape) -> dict[str, Callable[[], Call]]:
    return {
        "SDPA flash": lambda: functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": lambda: functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "varlen": lambda: functools.partial(auto, shape.tokens, backend="varlen"),
        "flex": lambda: functools.partial(auto, shape.tokens, backend="flex"),
    }


def packed_peers(shape: Shape, longest: int) -> dict[str, Callable[[], Call]]:
    """known: with the real number of documents and the longest of them."""
    documents = len(boundaries(shape)) - 1
    return {
        **{name: functools.partial(packed, shape.tokens, name) for name in ("varlen", "flex")},
        **{
            f"{name}, known": functools.partial(packed_known, documents, longest, name)
            for name in ("varlen", "cudnn")
        },
        "flex, mask kept": flex_kept,
    }


def packed(tokens: int, backend: str) -> Call:
    return functools.partial(auto, tokens, backend=backend)


def packed_known(documents: int, longest: int, backend: str) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, doc_ids_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
        ends = cu_seqlens[: documents + 1]
        return auto(longest, q, k, v, doc_ids_BT, ends, backend=backend)

    return call


def sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As anyone would call it."""
    rows = (rearrange(x, "b t h k -> b h t k") for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    with sdpa_kernel(kernel):
        o = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=grouped)
    return rearrange(o, "b h t k -> b t h k")


def flex_kept() -> Call:
    """FlexAttention whose block mask is made once, before it is timed: as if all layers of a step
    shared one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    kept: dict[str, object] = {}

    def call(q: Tensor, k: Tensor, v: Tensor, doc_ids_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
        batch, tokens = q.shape[:2]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (doc_ids_BT[b, i] == doc_ids_BT[b, j])

        if not kept:
            kept["mask"] = create_block_mask(visible, batch, None, tokens, tokens, device=q.device)
        rows = (rearrange(x, "b t h k -> b h t k") for x in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        o = compiled(*rows, block_mask=kept["mask"], enable_gqa=grouped)
        return rearrange(o, "b h t k -> b t h k")

    return call


def candidates() -> dict[str, list[dict[str, int]]]:
    """None: no kernel here is ours to launch. attention/choices/ is written by hand."""
    return {}


def tunings(device: torch.device) -> list[tuple[str, int, Callable[[dict[str, int]], object]]]:
    return []
