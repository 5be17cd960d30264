"""Checks and times cases; rows as the results' kernels.json has them.

    {kernel, shape, ours: R, peers: {name: R}, floor: {fwd_ms, fwdbwd_ms}}
    R = {fwd_ms, fwdbwd_ms, extra_mib, rel_err, eager_fwd_ms, eager_fwdbwd_ms} or {error}

fwd_ms, fwdbwd_ms: of the device, a CUDA graph replayed with a cold cache; eager_...: the same call
from Python, launches included; "graph": false where a call cannot be captured and both are eager.
fwd: without gradients wanted. extra_mib: the most memory of forward and backward beyond inputs,
outputs' gradients and inputs' gradients. rel_err: the largest relative error (Frobenius norms) of
an output or a gradient against float64.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llmtrain_kernels.bench.case import Call, Case
from llmtrain_kernels.bench.floor import Floor
from llmtrain_kernels.bench.timing import device_ms, eager_ms

FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError)
MOST_ON_DEVICE = 6 * 2**30  # bytes of expected results
WORSE = 1.1  # ours may be that many times as wrong as the best peer


def run(case: Case, device: torch.device, dtype: torch.dtype, floor: Floor) -> dict:
    """The row of a case; an implementation that fails has an error in place of times."""
    torch._dynamo.reset()  # peers are compiled for this shape alone
    inputs = case.make(device, dtype)
    upstream = gradients_to_give(case, inputs)
    expected = exact(case, inputs, upstream)
    implementations: dict[str, Callable[[], Call]] = {"ours": lambda: case.ours, **case.peers}
    rows = {}
    for name, load in implementations.items():
        clear(inputs, device)  # before the first too: exact() leaves gigabytes in the cache
        try:
            rows[name] = measure(case, load(), inputs, upstream, expected, device)
        except FAILURES as error:
            lines = str(error).strip().splitlines() or [""]
            rows[name] = {"error": f"{type(error).__name__}: {lines[0][:200]}"}
    clear(inputs, device)
    forward, backward = case.costs
    both = (forward, backward) if case.backward else (forward,)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "ours": rows.pop("ours"),
        "peers": rows,
        "floor": {"fwd_ms": floor.ms(forward), "fwdbwd_ms": floor.ms(*both)},
    }


def measure(
    case: Case,
    call: Call,
    inputs: dict[str, Tensor],
    upstream: tuple[Tensor, ...],
    expected: list[Tensor],
    device: torch.device,
) -> dict:
    """Errors first, then memory and times."""
    row: dict = {"rel_err": largest_error(results(case, call, inputs, upstream), expected)}

    def forward() -> object:
        with torch.no_grad():
            return call(**inputs)

    def both() -> object:
        return results(case, call, inputs, upstream)

    if device.type == "cuda":
        row["extra_mib"] = extra_mib(both, inputs, case)
    row["eager_fwd_ms"], row["eager_fwdbwd_ms"] = eager_ms(forward, device), eager_ms(both, device)
    try:
        row["fwd_ms"], row["fwdbwd_ms"] = device_ms(forward, device), device_ms(both, device)
    except RuntimeError:  # what waits for the device, or allocates outside of the pool
        row |= {"fwd_ms": row["eager_fwd_ms"], "fwdbwd_ms": row["eager_fwdbwd_ms"], "graph": False}
    return row


def outputs(call: Call, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    made = call(**inputs)
    return made if isinstance(made, tuple) else (made,)


def leaves(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [z for z in inputs.values() if z.requires_grad]


def results(
    case: Case, call: Call, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]
) -> list[Tensor]:
    """Outputs, and gradients of the inputs."""
    if not case.backward:
        with torch.no_grad():
            return list(outputs(call, inputs))
    made = outputs(call, inputs)
    return [*made, *torch.autograd.grad(made, leaves(inputs), upstream)]


def gradients_to_give(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Random gradients of the outputs; 1 for a scalar, as a loss has."""
    with torch.no_grad():
        made = outputs(case.reference, inputs)
    generator = torch.Generator(made[0].device).manual_seed(1)
    return tuple(
        torch.ones_like(z) if z.dim() == 0 else torch.empty_like(z).normal_(generator=generator)
        for z in made
    )


def exact(case: Case, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    """Results of the reference in float64, from the same rounded inputs; large ones kept on the
    host."""
    wide = {
        name: z.detach().double().requires_grad_(z.requires_grad) if z.is_floating_point() else z
        for name, z in inputs.items()
    }
    made = results(case, case.reference, wide, tuple(z.double() for z in upstream))
    large = sum(z.nbytes for z in made) > MOST_ON_DEVICE
    return [z.detach().cpu() if large else z.detach() for z in made]


def largest_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Not a number when anything is."""
    errors = [
        ((a.double() - b.to(a.device)).norm() / (b.norm().item() or 1.0)).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return float(torch.tensor(errors).max())


def extra_mib(both: Callable[[], object], inputs: dict[str, Tensor], case: Case) -> float:
    """The peak of a call beyond what stood before and what it returns."""
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(z.nbytes for z in kept)
    return max(0.0, (peak - returned) / 2**20)


def clear(inputs: dict[str, Tensor], device: torch.device) -> None:
    for z in inputs.values():
        z.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wrong(row: dict, limit: float) -> str | None:
    """Why ours is not right, or None: an error, nan, or further from float64 than the best peer
    allows (WORSE), and than `limit`."""
    ours = row["ours"]
    if "error" in ours:
        return ours["error"]
    known = [peer["rel_err"] for peer in row["peers"].values() if "rel_err" in peer]
    allowed = max(limit, WORSE * min(known, default=0.0))
    if not ours["rel_err"] <= allowed:
        return f"relative error {ours['rel_err']:.1e}, allowed {allowed:.1e}"
    return None


def lines(row: dict) -> Iterator[str]:
    """A row for the console: one line an implementation."""
    yield f"{row['kernel']} {row['shape']}"
    for name, found in {"ours": row["ours"], **row["peers"]}.items():
        if "error" in found:
            yield f"  {name:22}{found['error']}"
            continue
        parts = []
        for key in ("fwd_ms", "fwdbwd_ms"):
            share = row["floor"][key] / found[key]
            parts.append(f"{key[:-3]:7}{found[key]:8.3f} ms {share:4.0%} of floor")
            parts.append(f"(eager {found['eager_' + key]:.3f})")
        memory = f"{found['extra_mib']:7.0f} MiB " if "extra_mib" in found else ""
        yield f"  {name:22}{' '.join(parts)} {memory}error {found['rel_err']:.1e}"
