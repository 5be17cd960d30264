"""The sLSTM's backends: checked against the float64 reference, then timed.

    python kernels/bench/slstm.py --out results/slstm.json        (two minutes, one GPU)

Errors are relative (Frobenius norms) and must stay within twice the larger of the loop's and the
reference's in float32. Times are medians over CUDA events after warm-up; "forward" wants no
gradients. On a CPU sizes are small and the kernels are not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llmtrain_kernels.slstm import slstm

NAMES = ("h", "last h", "last c / n", "dx", "dR", "dh0", "dc0", "dn0", "dm0")
SLACK = 2e-7  # beside twice the error of others in float32
# (batch, tokens, heads, width)
CHECKED = [(5, 200, 2, 16), (17, 200, 2, 32), (5, 200, 3, 64), (33, 130, 2, 128), (64, 65, 4, 128)]
TIMED = [(64, 1024, 4, 128), (8, 2048, 4, 128), (64, 1024, 4, 64)]
QUICK_CHECKED = [(2, 9, 2, 16)]
QUICK_TIMED = [(2, 32, 2, 16)]


def noise(*shape: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def tensors(shape: tuple[int, ...], device: torch.device, *, state: bool) -> list[Tensor]:
    """x and R, and h, c, n, m of an initial state."""
    batch, tokens, heads, width = shape
    x = noise(batch, tokens, heads, 4 * width, seed=0, device=device)
    x[..., 2 * width : 3 * width] += 3.0  # forget gates that reach back
    made = [x, noise(heads, width, 4 * width, seed=1, device=device) * width**-0.5]
    if state:
        h, c, n, m = (noise(batch, heads, width, seed=s, device=device) for s in range(2, 6))
        made += [h.tanh(), c, n.abs() + 0.5, m]
    return made


def results(made: list[Tensor], dtype: torch.dtype, **options: object) -> list[Tensor]:
    """Values and gradients in the order of NAMES."""
    leaves = [z.to(dtype).requires_grad_() for z in made]
    if len(leaves) > 2:
        options["initial_state"] = tuple(leaves[2:])
    out, (h, c, n, _) = slstm(*leaves[:2], return_state=True, **options)
    ends = [out, h, c / n]
    weights = [noise(*z.shape, seed=9, device=z.device).to(dtype) for z in ends]
    return [*ends, *torch.autograd.grad(ends, leaves, weights)]


def check(backends: list[str], shapes: list[tuple[int, ...]], device: torch.device) -> list[dict]:
    """A row a backend, shape, forget gate and start, with its errors."""
    rows = []
    for shape in shapes:
        for forget_gate in ("sigmoid", "exp"):
            for start in ("state", "documents"):
                made = tensors(shape, device, state=start == "state")
                options: dict[str, object] = {"forget_gate": forget_gate}
                if start == "documents":
                    starts_BT = noise(*shape[:2], seed=7, device=device) > 1.5
                    options["doc_ids_BT"] = starts_BT.cumsum(dim=1, dtype=torch.int32)
                exact = results(made, torch.float64, backend="reference", **options)

                def errors(backend: str) -> dict[str, float]:
                    got = results(made, torch.float32, backend=backend, **options)  # noqa: B023
                    return {
                        name: ((a.double() - b).norm() / b.norm()).item()
                        for name, a, b in zip(NAMES, got, exact)  # noqa: B023
                    }

                others = errors("reference"), errors("loop")
                limits = {name: 2 * max(e[name] for e in others) + SLACK for name in others[0]}
                for backend in backends:
                    row = {"check": backend, "shape": shape, "forget_gate": forget_gate}
                    found = errors(backend)
                    good = all(found[name] < limits[name] for name in found)
                    rows.append({**row, "start": start, "good": good, "errors": found})
                    worst = " ".join(f"{name} {e:.1e}" for name, e in found.items())
                    verdict = "" if good else "WRONG "
                    print(
                        f"{verdict}{backend:6} {shape} {forget_gate} {start}: {worst}", flush=True
                    )
    return rows


def median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in (0, 1)]
            events[0].record()
            call()
            events[1].record()
            events[1].synchronize()
            times.append(events[0].elapsed_time(events[1]))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure(
    backends: list[str], shapes: list[tuple[int, ...]], device: torch.device, repeats: int
) -> list[dict]:
    """A row a backend and shape: milliseconds and microseconds a token, memory of a step."""
    rows = []
    for shape in shapes:
        x, r = (z.requires_grad_() for z in tensors(shape, device, state=False))
        for backend in backends:

            def both() -> None:
                out, _ = slstm(x, r, backend=backend)  # noqa: B023
                torch.autograd.grad(out, (x, r), torch.ones_like(out))  # noqa: B023

            def forward() -> None:
                with torch.no_grad():
                    slstm(x, r, backend=backend)  # noqa: B023

            row: dict[str, object] = {"time": backend, "shape": shape}
            for name, call in (("forward", forward), ("both", both)):
                row[f"{name}_ms"] = median_ms(call, device, repeats)
                row[f"{name}_us_per_token"] = 1e3 * row[f"{name}_ms"] / shape[1]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both()
                row["step_bytes"] = torch.cuda.max_memory_allocated() - before
            rows.append(row)
            print(
                f"{backend:6} {shape}: forward {row['forward_ms']:.2f} ms"
                f" ({row['forward_us_per_token']:.2f} us a token), with backward"
                f" {row['both_ms']:.2f} ms ({row['both_us_per_token']:.2f} us a token)"
                + (f", {row['step_bytes'] / 2**30:.2f} GiB" if "step_bytes" in row else ""),
                flush=True,
            )
    return rows


def kernels(shape: tuple[int, ...], device: torch.device) -> list[dict]:
    """Microseconds a token of each kernel of a training step of the triton backend."""
    x, r = (z.requires_grad_() for z in tensors(shape, device, state=False))

    def step() -> None:
        out, _ = slstm(x, r, backend="triton")
        torch.autograd.grad(out, (x, r), torch.ones_like(out))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    rows = []
    for event in sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)[:8]:
        us = event.self_device_time_total / shape[1]
        rows.append({"kernel": event.key, "shape": shape, "us_per_token": us})
        print(f"  {us:7.3f} us a token  {event.key[:90]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    backends = ["triton", "loop"] if on_gpu else ["loop"]
    facts = {"torch": torch.__version__, "device": "cpu"}
    if on_gpu:
        import triton

        facts |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    print(facts)
    rows = check(backends, CHECKED if on_gpu else QUICK_CHECKED, device)
    right = [b for b in backends if all(row["good"] for row in rows if row["check"] == b)]
    timed = TIMED if on_gpu else QUICK_TIMED
    rows += measure(right, timed, device, arguments.repeats)
    if "triton" in right:
        rows += [row for shape in timed for row in kernels(shape, device)]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    if right != backends:
        sys.exit("errors above their limits; these backends were not timed")


if __name__ == "__main__":
    main()
