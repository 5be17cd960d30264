"""Rotary embedding of queries and keys beside its peers.

Cases: dense rows that share angles; packed documents, whose tokens have their own; queries and keys
as views of one packed projection (forward alone: autograd puts the gradients of views together); a
quarter of each head turned; latent attention. liger turns in place: it gets clones of tensors and
of gradients, which are timed. fla turns one tensor a launch, by angles in the dtype of q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.rope import cost, reference, rope
from llmtrain_kernels.rope.fused import run
from llmtrain_kernels.rope.reference import formula

# name, B, T, H, G, width of q, of k, R, rows of angles, part
SHAPES = [
    ("rope", 4, 4096, 32, 8, 128, 128, 64, 1, None),
    ("rope documents", 1, 16384, 32, 8, 128, 128, 64, 1, None),
    ("rope packed view", 4, 4096, 32, 8, 128, 128, 64, 1, None),
    ("rope partial", 4, 4096, 32, 8, 128, 128, 16, 1, None),
    ("rope latent", 1, 4096, 128, 1, 192, 64, 32, 1, 64),
    ("rope", 4, 4096, 16, 8, 128, 128, 64, 1, None),
    ("rope", 16, 1024, 12, 4, 64, 64, 32, 1, None),
]
QUICK = [
    ("rope", 2, 6, 4, 2, 8, 8, 4, 1, None),
    ("rope documents", 1, 9, 4, 2, 8, 8, 4, 1, None),
    ("rope packed view", 2, 6, 4, 2, 8, 8, 4, 1, None),
    ("rope latent", 1, 6, 4, 1, 10, 4, 2, 1, 4),
]


def angles(rows: int, tokens: int, half: int, documents: int, device: torch.device) -> list[Tensor]:
    """cos and sin [rows, T, R], of so many documents of equal length in a row."""
    positions_T = torch.arange(tokens, device=device, dtype=torch.float64) % -(-tokens // documents)
    frequencies_R = 10000.0 ** -(torch.arange(half, device=device, dtype=torch.float64) / half)
    theta_BTR = (positions_T[:, None] * frequencies_R).expand(rows, tokens, half)
    return [theta_BTR.cos().float().contiguous(), theta_BTR.sin().float().contiguous()]


def make(shape: tuple) -> Callable[[torch.device, torch.dtype], dict[str, Tensor]]:
    name, batch, tokens, heads, groups, q_width, k_width, half, rows, _ = shape

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def leaf(*sizes: int) -> Tensor:
            noise = torch.randn(batch, tokens, *sizes, generator=generator, device=device)
            return noise.to(dtype).requires_grad_()

        cos, sin = angles(rows, tokens, half, 8 if "documents" in name else 1, device)
        if "view" in name:
            return {"qkv": leaf((heads + 2 * groups) * q_width), "cos": cos, "sin": sin}
        both = {"q": leaf(heads, q_width), "k": leaf(groups, k_width)}
        return both | {"cos": cos, "sin": sin}

    return inputs


def on_views(call: Call, heads: int, groups: int, width: int) -> Call:
    """The same on the first heads and groups of a packed projection."""

    def packed(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        widths = [heads * width, groups * width, groups * width]
        q, k, _ = qkv.split(widths, dim=-1)
        q, k = q.unflatten(-1, (heads, width)), k.unflatten(-1, (groups, width))
        return call(q=q, k=k, cos=cos, sin=sin)

    return packed


def with_part(function: Callable[..., tuple[Tensor, Tensor | None]], part: int | None) -> Call:
    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = function(q, k, cos, sin, part=part)
        return q, k

    return call


def liger() -> Call:
    from liger_kernel.transformers.functional import liger_rope

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        both = (torch.cat([z, z], dim=-1) for z in (cos, sin))
        q, k = liger_rope(q.clone().transpose(1, 2), k.clone().transpose(1, 2), *both)
        made = q.transpose(1, 2), k.transpose(1, 2)
        for z in made:
            if z.requires_grad:
                z.register_hook(torch.clone)
        return made

    return call


def fla() -> Call:
    from fla.modules.rotary import rotary_embedding

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos[0].to(q.dtype), sin[0].to(q.dtype)
        return rotary_embedding(q, cos, sin), rotary_embedding(k, cos, sin)

    return call


def peers(name: str, part: int | None) -> dict[str, Callable[[], Call]]:
    """Loaders. liger and fla turn the beginning of a head only."""
    found: dict[str, Callable[[], Call]] = {
        "torch.compile": lambda: torch.compile(with_part(formula, part))
    }
    if part is None:
        found |= {"liger (clones)": liger, "fla": fla}
    return found


def cases(quick: bool) -> list[Case]:
    made = []
    dtype = torch.float32 if quick else torch.bfloat16
    for shape in QUICK if quick else SHAPES:
        name, batch, tokens, heads, groups, q_width, k_width, half, rows, part = shape
        ours, exact = with_part(rope, part), with_part(reference, part)
        others = peers(name, part)
        if "view" in name:
            where = (heads, groups, q_width)
            ours, exact = on_views(ours, *where), on_views(exact, *where)
            others = {
                name: lambda load=load, where=where: on_views(load(), *where)
                for name, load in others.items()
            }
        sizes = {"heads": heads, "kv_heads": groups, "k_width": q_width, "kv_width": k_width}
        widths = str(q_width) if k_width == q_width else f"{q_width}/{k_width}"
        case = Case(
            kernel=name,
            shape=f"B{batch} T{tokens} H{heads}/{groups} K{widths} turned {2 * half}",
            make=make(shape),
            ours=ours,
            reference=exact,
            costs=cost(batch * tokens, **sizes, turned=2 * half, dtype=dtype, angles=rows * tokens),
            peers=others,
            backward="view" not in name,
        )
        made.append(case)
    return made


def candidates() -> dict[str, list[dict[str, int]]]:
    """Launches for the tuner: (pairs of a token and a head, warps). At R = 64, where 8 threads have
    a pair, (8, 2) is one vector of each half a thread, (8, 1) two and (32, 2) four."""
    tiles = [(8, 2), (16, 4), (32, 8), (8, 1), (16, 2), (32, 4), (64, 8), (4, 2), (8, 4), (16, 8)]
    tiles += [(32, 2), (64, 4)]
    keys = ("rows", "num_warps")
    return {"rope": [dict(zip(keys, tile, strict=True)) for tile in tiles]}


def tunings(
    device: torch.device,
) -> list[tuple[str, int, Callable[[Mapping[str, int]], object]]]:
    """(kernel, size as launch() has it, what runs it with a candidate): one for each R, which for
    32 runs small heads and latent attention's, that have to agree."""
    shapes = {
        16: [(4, 4096, 32, 8, 128, 128, 0)],
        64: [(4, 4096, 32, 8, 128, 128, 0)],
        32: [(16, 1024, 12, 4, 64, 64, 0), (1, 4096, 128, 1, 192, 64, 128)],
        128: [(4, 4096, 16, 4, 256, 256, 0)],
    }
    found = []
    for half, several in shapes.items():
        given = []
        for batch, tokens, heads, groups, q_width, k_width, q_start in several:
            q, k = (
                torch.randn(batch, tokens, count, width, device=device, dtype=torch.bfloat16)
                for count, width in ((heads, q_width), (groups, k_width))
            )
            cos, sin = angles(1, tokens, half, 1, device)
            given.append((q, k, cos, sin, False, q_start, 0, False))

        def turn(config: Mapping[str, int], given: list[tuple] = given) -> object:
            return [run(*tensors, config) for tensors in given]

        found.append(("rope", half, turn))
    return found
