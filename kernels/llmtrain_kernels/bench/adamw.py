"""AdamW and the gradients' norm beside torch's: a fifth of 1.26B parameters, in one flat tensor as
ZeRO partitions are, and in the tensors of five of its layers as ZeRO-0 has them.

Ours and torch's fused step get the clipping factor and the skip flag as the engine gives them;
torch's foreach step has neither and does less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain_kernels import adamw
from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.bench.in_place import InPlace, State, TorchAdamW
from llmtrain_kernels.cost import Cost

KNOBS = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
LAYER = [2048 * 2048] * 2 + [1024 * 2048] * 2 + [2 * 5632 * 2048, 5632 * 2048] + [2048] * 2
FREE = Cost(flops=0.0, bytes_read=0.0, bytes_written=0.0)


def cases(quick: bool) -> list[Case]:
    flat = [1 << 10] if quick else [1 << 28]
    layers = [48, 16, 7] if quick else LAYER * 5
    found = []
    for name, sizes in (("flat", flat), (f"{len(layers)} tensors", layers)):
        shape = f"N{sum(sizes)} {name}"
        found += [step_case(shape, sizes), norm_case(shape, sizes)]
    return found


def step_case(shape: str, sizes: list[int]) -> Case:
    count = sum(sizes)

    def cut(z: Tensor) -> list[Tensor]:
        return list(z.split(sizes))

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """In float32, whatever the activations are in."""
        p, g, m = (normal(count, device, seed) for seed in range(3))
        return {"p": p, "g": g, "m": m, "v": normal(count, device, 3).square_()}

    def reference(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return InPlace(by("reference"), cut)(p, g, m, v)

    peers: dict[str, Callable[[], Call]] = {
        "torch fused": lambda: InPlace(by("torch"), cut),
        "torch.optim.AdamW fused": lambda: InPlace(TorchAdamW(KNOBS, fused=True), cut),
        "torch.optim.AdamW foreach": lambda: InPlace(TorchAdamW(KNOBS, foreach=True), cut),
    }
    return Case(
        kernel="adamw",
        shape=shape,
        make=make,
        ours=InPlace(by("auto"), cut),
        reference=reference,
        costs=(adamw.cost(count), FREE),
        peers=peers,
        backward=False,
    )


def by(backend: str) -> Callable[[State], None]:
    """A step with a factor of 1: torch writes the divided gradients back, and is called often."""
    scalars: dict[str, Tensor] = {}

    def step(state: State) -> None:
        if not scalars:
            scalars["grad_scale"] = torch.ones((), device=state[0][0].device)
            scalars["found_inf"] = torch.zeros((), device=state[0][0].device)
        adamw.adamw_step(*state, **KNOBS, **scalars, backend=backend)

    return step


def norm_case(shape: str, sizes: list[int]) -> Case:
    def squares(backend: str) -> Call:
        return lambda g: adamw.sum_of_squares(list(g.split(sizes)), backend=backend)

    return Case(
        kernel="sum_of_squares",
        shape=shape,
        make=lambda device, dtype: {"g": normal(sum(sizes), device, 1)},
        ours=squares("auto"),
        reference=squares("reference"),
        costs=(adamw.norm_cost(sum(sizes)), FREE),
        peers={"torch get_total_norm": lambda: squares("torch")},
        backward=False,
    )


def normal(count: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(count, device=device).normal_(generator=generator)


def candidates() -> dict[str, list[dict[str, int]]]:
    """Of sums the largest first: of equals those with the fewest look-ups and partial sums."""
    blocks = [(b, w) for b in (1024, 2048, 4096, 8192, 16384) for w in (4, 8, 16)]
    wide = [{"BLOCK": b, "num_warps": w} for b, w in blocks if 4 <= b // w // 32 <= 32]
    return {
        "adamw": [c for c in wide if c["BLOCK"] <= 8192 and c["BLOCK"] // c["num_warps"] <= 512],
        "sum_of_squares": wide[::-1],
    }


def tunings(device: torch.device) -> list[tuple[str, int, Callable[[dict[str, int]], object]]]:
    """(Kernel, size, what runs it once with a configuration). Sums over the tensors of layers: one
    large tensor takes nearly the same with every configuration."""
    count = 1 << 28 if device.type == "cuda" else 1 << 10
    sizes = LAYER * 5 if device.type == "cuda" else [count]
    p, g, m = (normal(count, device, seed) for seed in range(3))
    v, step = g.square(), torch.ones((), device=device)
    scale, skip = torch.ones((), device=device), torch.zeros((), device=device)

    def one(config: dict[str, int]) -> None:
        lists = ([p], [g], [m], [v], [step])
        adamw.adamw_step(*lists, **KNOBS, grad_scale=scale, found_inf=skip, config=config)

    parts = list(g[: sum(sizes)].split(sizes))
    return [
        ("adamw", count, one),
        ("sum_of_squares", sum(sizes), lambda config: adamw.sum_of_squares(parts, config=config)),
    ]
