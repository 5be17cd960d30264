"""Initialisation keyed by name: a parameter's first value depends on its name and the seed alone.

So it is independent of world size, ZeRO stage and of which other parts the model has. A module's
reset_parameters() fills its own direct parameters from torch's global generator; `initialise`
walks the modules and seeds that generator from (seed, module name) before each call. Large modules
take a generator of their own, seeded alike, and are filled in threads: the same values.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def depth_std(std: float, n_layers: int) -> float:
    """Standard deviation of an output projection into the residual stream: std / sqrt(2 L).

    GPT-2 (Radford et al. 2019), section 2.3: two residual additions per layer.
    """
    return std / math.sqrt(2 * n_layers)


@torch.no_grad()
def fill_time_steps(bias: Tensor, dt_min: float, dt_max: float, *, dt_floor: float = 0.0) -> None:
    """Fill in place so that softplus(bias) is log-uniform in [dt_min, dt_max], at least dt_floor.

    Gu and Dao 2023 (arXiv:2312.00752), section 3.6.
    """
    dt = bias.uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def keyed_seed(seed: int, name: str) -> int:
    """63-bit seed for one named thing."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of the model in place; the caller's random state is left alone.

    Values are drawn by the generator of the device that the parameters are on; fill on the CPU and
    move afterwards, and they do not depend on the device. A shared parameter is filled by every
    module that holds it; the last in model.named_modules() wins.
    Raises TypeError when a module owns parameters but has no reset_parameters().
    """
    device = next(model.parameters()).device
    owners = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ThreadPoolExecutor(threads()) as pool,
    ):
        filling = []
        for name, module in model.named_modules():
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            if not hasattr(module, "reset_parameters"):
                raise TypeError(
                    f"{name}: {type(module).__name__} owns parameters but has no reset_parameters()"
                )
            own = keyed_seed(seed, name)
            alone = all(owners[p] == 1 for p in module.parameters(recurse=False))
            alone &= device.type != "meta"  # which has no generators, and nothing to draw
            if alone and "generator" in inspect.signature(module.reset_parameters).parameters:
                generator = torch.Generator(device).manual_seed(own)
                filling.append(pool.submit(module.reset_parameters, generator))
            else:
                torch.manual_seed(own)
                module.reset_parameters()
        for filled in filling:
            filled.result()


def threads() -> int:
    """This process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
