"""Muon's orthogonalisation in the batches that 1.26B parameters come in, its symmetric products,
and its element-wise passes, beside torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain_kernels import muon
from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.cost import Cost

STEPS = 5
# N, R, C: all that one launch gets of 2048 wide blocks with 16 / 8 heads and 5632 hidden units.
SHAPES = [(16, 2048, 2048), (32, 1024, 2048), (5, 2048, 5632), (5, 5632, 2048)]
FREE = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)


def cases(quick: bool) -> list[Case]:
    shapes = [(2, 8, 12), (3, 12, 8)] if quick else SHAPES
    found = [iteration_case(*shape) for shape in shapes]
    found += [product_case(*shape) for shape in shapes]
    found.append(commuting_case(*shapes[0][:2]))
    return [*found, element_case(1 << 10 if quick else 1 << 27)]


def matrices(n: int, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Directions of unequal size, as gradients have."""
    generator = torch.Generator(device).manual_seed(0)
    x_NRC = torch.empty(n, rows, cols, device=device).normal_(generator=generator)
    size_C = torch.arange(1.0, cols + 1, device=device).rsqrt()
    return (x_NRC * size_C).to(dtype)


def ours_in(x: Tensor) -> torch.dtype:
    """What the optimizer computes in."""
    return torch.float16 if x.is_cuda else x.dtype


def iteration_case(n: int, rows: int, cols: int) -> Case:
    def torchs() -> Call:
        from torch.optim._muon import _zeropower_via_newtonschulz as one

        return lambda x: torch.stack([one(z, muon.COEFFICIENTS, STEPS, muon.EPS) for z in x])

    def batched(x: Tensor) -> Tensor:
        a, b, c = muon.COEFFICIENTS
        x = x.mT if rows > cols else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=muon.EPS)
        for _ in range(STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if rows > cols else x

    return Case(
        kernel="newton_schulz",
        shape=f"N{n} R{rows} C{cols}",
        make=lambda device, dtype: {"x": matrices(n, rows, cols, device, dtype)},
        ours=lambda x: muon.newton_schulz(x, STEPS, dtype=ours_in(x)),
        reference=lambda x: muon.one_by_one(x, STEPS),
        costs=(muon.iteration_cost(n, rows, cols, STEPS, itemsize=2), FREE),
        peers={
            "one by one": lambda: lambda x: muon.one_by_one(x, STEPS),
            "torch.optim.Muon's": torchs,
            "batched": lambda: batched,
            "batched, torch.compile": lambda: torch.compile(batched),
        },
        backward=False,
    )


def product_case(n: int, rows: int, cols: int) -> Case:
    def turned(x: Tensor) -> Tensor:
        return x.mT if rows > cols else x

    short, long = sorted((rows, cols))
    return Case(
        kernel="symmetric_matmul",
        shape=f"N{n} R{rows} C{cols}",
        make=lambda device, dtype: {"x": matrices(n, rows, cols, device, dtype)},
        ours=lambda x: muon.symmetric_matmul(turned(x)),
        reference=lambda x: muon.symmetric_matmul(turned(x), backend="reference"),
        costs=(muon.symmetric_cost(n, short, long, itemsize=2), FREE),
        peers={"cuBLAS": lambda: lambda x: turned(x) @ turned(x).mT},
        backward=False,
    )


def commuting_case(n: int, rows: int) -> Case:
    """Two polynomials of one Gram matrix, here itself and its square, of norms near 1."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        x = matrices(n, rows, rows, device, torch.float32)
        gram = x @ x.mT
        gram = gram / gram.norm(dim=(1, 2), keepdim=True) * rows**0.5
        return {"x": (gram @ gram).to(dtype), "y": gram.to(dtype)}

    return Case(
        kernel="symmetric_matmul",
        shape=f"N{n} R{rows}, two factors",
        make=make,
        ours=lambda x, y: muon.symmetric_matmul(x, y),
        reference=lambda x, y: muon.symmetric_matmul(x, y, backend="reference"),
        costs=(muon.symmetric_cost(n, rows, rows, itemsize=2, other=True), FREE),
        peers={"cuBLAS": lambda: lambda x, y: x @ y},
        backward=False,
    )


def element_case(count: int) -> Case:
    """Momentum, update and weights; the update itself stands for the orthogonalised one."""

    def step(backend: str, dtype: torch.dtype | None = None) -> Call:
        def call(p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            kind = dtype or (torch.bfloat16 if p.is_cuda else p.dtype)
            lists, options = ([g], [m]), {"momentum": 0.95, "nesterov": True, "backend": backend}
            updates = muon.momentum_step(*lists, dtype=kind, **options)
            muon.apply_updates([p], updates, rate=1e-3, decay=1e-4, backend=backend)
            return p, m

        return call

    def apart(call: Call) -> Call:
        """On copies at first: it changes its inputs, and is checked at its first call."""
        kept: dict[str, Tensor] = {}

        def run(p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            if kept.get("source") is not p:
                kept.update(source=p, p=p.clone(), m=m.clone())
            return call(kept["p"], g, kept["m"])

        return run

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        return {
            name: torch.empty(count, device=device).normal_(generator=generator) for name in "pgm"
        }

    exact = step("reference", torch.float64)
    return Case(
        kernel="muon_passes",
        shape=f"N{count}",
        make=make,
        ours=apart(step("auto")),
        reference=lambda p, g, m: exact(p.clone(), g, m.clone()),
        costs=(muon.cost(count), FREE),
        peers={"torch": lambda: apart(step("reference"))},
        backward=False,
    )


def candidates() -> dict[str, list[dict[str, int]]]:
    blocks = [(b, w) for b in (1024, 2048, 4096, 8192) for w in (4, 8, 16)]
    lists = [{"BLOCK": b, "num_warps": w} for b, w in blocks if 4 <= b // w // 32 <= 32]
    tiles = [(64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3)]
    tiles += [(128, 128, k, w, s) for k, s in ((32, 4), (64, 3), (64, 4), (128, 2)) for w in (4, 8)]
    tiles += [(64, 128, 64, 4, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4)]
    keys = ("B", "BN", "BK", "num_warps", "num_stages")
    return {
        "muon_apply": lists,
        "muon_momentum": lists,
        "symmetric_matmul": [dict(zip(keys, tile)) for tile in tiles],
    }


def tunings(device: torch.device) -> list[tuple[str, int, Callable[[dict[str, int]], object]]]:
    """(Kernel, size, what runs it once with a configuration)."""
    cuda = device.type == "cuda"
    count = 1 << 27 if cuda else 1 << 10
    p, g, m = (torch.randn(count, device=device) for _ in range(3))
    dtype = torch.bfloat16 if cuda else torch.float32
    options = {"momentum": 0.95, "nesterov": True, "dtype": dtype}
    (u,) = muon.momentum_step([g], [m], **options)
    known = [
        ("muon_momentum", count, lambda c: muon.momentum_step([g], [m], **options, config=c)),
        (
            "muon_apply",
            count,
            lambda c: muon.apply_updates([p], [u], rate=1e-3, decay=1e-4, config=c),
        ),
    ]
    for n, rows, cols in [(4, 512, 2048), *SHAPES[:3]] if cuda else [(2, 8, 12)]:
        x = matrices(n, rows, cols, device, dtype)
        product = functools.partial(muon.symmetric_matmul, x)
        known.append(("symmetric_matmul", rows, lambda c, f=product: f(config=c)))
    return known
