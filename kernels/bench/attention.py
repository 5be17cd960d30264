"""Attention's backends: each is checked against the float64 reference, then timed.

    python kernels/bench/attention.py --out results/attention.json        (about a minute, one GPU)

A backend that fails its check, or cannot run, is reported with its own words and not timed. Times
are medians over CUDA events after warm-up, eager, with gradients wanted. "of floor" is the time
that cost() allows at the device's peaks, divided by the measured one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llmtrain_kernels.attention import attention, cost

# Measured on these devices: bf16 8192^3 product, and copy (read + written).
PEAKS = {"H100": (798e12, 3.0e12), "H200": (790e12, 4.3e12)}
# Relative errors (Frobenius) of o, and of dq, dk, dv, that bf16 kernels must stay below.
LIMITS = {torch.bfloat16: (5e-3, 1e-2), torch.float32: (2e-5, 4e-5)}
FAILURES = (RuntimeError, ValueError, TypeError, ImportError)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """mean_document: average length of packed documents, None for dense rows."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    window: int | None = None
    mean_document: int | None = None

    def __str__(self) -> str:
        text = f"B{self.batch} T{self.tokens} H{self.heads}/{self.kv_heads} K{self.width}"
        text += f" window {self.window}" if self.window else ""
        return text + (f" documents of {self.mean_document}" if self.mean_document else "")


SMALL = Shape(batch=2, tokens=515, heads=8, kv_heads=2, width=64)  # 515: no multiple of a block
CHECKED = [
    SMALL,
    replace(SMALL, mean_document=100),
    replace(SMALL, window=129),
    replace(SMALL, window=129, mean_document=100),
    replace(SMALL, batch=1, kv_heads=8, width=128),
    replace(SMALL, batch=1, kv_heads=8, width=128, mean_document=100),
]
TIMED = [
    Shape(batch=4, tokens=4096, heads=16, kv_heads=16, width=128),
    Shape(batch=32, tokens=1024, heads=12, kv_heads=4, width=64),
    Shape(batch=32, tokens=1024, heads=12, kv_heads=4, width=64, mean_document=500),
    Shape(batch=8, tokens=4096, heads=16, kv_heads=8, width=128, mean_document=700),
    Shape(batch=8, tokens=4096, heads=16, kv_heads=8, width=128, window=1024),
]
QUICK_CHECKED = [replace(shape, tokens=131) for shape in CHECKED]
QUICK_TIMED = [replace(TIMED[1], batch=1, tokens=128), replace(TIMED[2], batch=1, tokens=128)]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a shape; `lengths` are those of its rows or documents."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    arguments: dict[str, object]
    lengths: list[int]


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def noise(heads: int) -> Tensor:
        size = (shape.batch, shape.tokens, heads, shape.width)
        return torch.randn(size, generator=generator).to(device, dtype)

    q, k, v, do = (noise(n) for n in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads))
    total = shape.batch * shape.tokens
    arguments: dict[str, object] = {"window": shape.window}
    starts_BT = torch.zeros(shape.batch, shape.tokens, dtype=torch.bool)
    if shape.mean_document:
        starts_BT = torch.rand(starts_BT.shape, generator=generator) < 1 / shape.mean_document
    starts_BT[:, 0] = True
    boundaries = [*starts_BT.flatten().nonzero().flatten().tolist(), total]
    lengths = [b - a for a, b in itertools.pairwise(boundaries)]
    if shape.mean_document:
        arguments["doc_ids_BT"] = starts_BT.cumsum(dim=1, dtype=torch.int32).to(device)
        arguments["cu_seqlens"] = torch.tensor(boundaries, dtype=torch.int32, device=device)
        arguments["max_seqlen"] = max(lengths)
    leaves = {name: x.requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    return Inputs(**leaves, do=do, arguments=arguments, lengths=lengths)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """call has attention's arguments. sparse: takes documents and windows. checks: how many of
    CHECKED it must pass; timed: whether it is timed then."""

    name: str
    call: Callable[..., Tensor]
    sparse: bool = True
    checks: int = len(CHECKED)
    timed: bool = True

    def takes(self, shape: Shape) -> bool:
        return self.sparse or (shape.window is None and shape.mean_document is None)


def peer(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, window: None) -> Tensor:
    """SDPA with one kernel, as anyone would call it."""
    with sdpa_kernel(kernel):
        o = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            is_causal=True,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return o.transpose(1, 2)


def contenders(device: torch.device) -> list[Contender]:
    """Fast ones first: what compiles takes seconds for a shape."""
    peers = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return [
        *(
            Contender(name=name, call=functools.partial(attention, backend=name))
            for name in ("auto", "sdpa", "varlen", "cudnn", "flash_attn")
        ),
        *(
            Contender(name=f"peer: {name}", call=functools.partial(peer, kernel), sparse=False)
            for name, kernel in peers.items()
            if device.type == "cuda"
        ),
        Contender(
            name="auto, compiled",
            call=torch.compile(attention, fullgraph=True),
            checks=3,
            timed=False,
        ),
        Contender(name="flex", call=functools.partial(attention, backend="flex")),
    ]


def gradients(call: Callable[..., Tensor], x: Inputs) -> tuple[Tensor, ...]:
    """(o, dq, dk, dv)"""
    o = call(x.q, x.k, x.v, **x.arguments)
    return o, *torch.autograd.grad(o, (x.q, x.k, x.v), x.do.to(o.dtype))


def reference(x: Inputs) -> tuple[Tensor, ...]:
    """(o, dq, dk, dv) in float64 from the same rounded inputs."""
    exact = {name: getattr(x, name).detach().double() for name in ("q", "k", "v", "do")}
    for name in ("q", "k", "v"):
        exact[name].requires_grad_()
    return gradients(functools.partial(attention, backend="reference"), replace(x, **exact))


def check(
    call: Callable[..., Tensor], x: Inputs, expected: tuple[Tensor, ...]
) -> tuple[bool, dict[str, float]]:
    """Whether all errors are within LIMITS, and the errors."""
    got = gradients(call, x)
    errors = {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(("o", "dq", "dk", "dv"), got, expected)
    }
    limit_o, limit_gradient = LIMITS[x.q.dtype]
    good = all(e < (limit_o if name == "o" else limit_gradient) for name, e in errors.items())
    return good, errors


def median_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call after three warm-up calls."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            events[1].synchronize()
            times.append(events[0].elapsed_time(events[1]))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def floors(shape: Shape, x: Inputs, peaks: tuple[float, float] | None) -> dict[str, float]:
    """Milliseconds that cost() allows, forward and with backward; empty without peaks."""
    if peaks is None:
        return {}
    costs = cost(
        x.lengths,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        k_width=shape.width,
        v_width=shape.width,
        dtype=x.q.dtype,
        window=shape.window,
    )
    forward, backward = (
        1e3 * part.seconds(flops_per_second=peaks[0], bytes_per_second=peaks[1]) for part in costs
    )
    return {"forward_floor_ms": forward, "both_floor_ms": forward + backward}


def run_checks(
    found: list[Contender], shapes: list[Shape], device: torch.device, dtype: torch.dtype
) -> Iterator[dict]:
    """One row per contender and shape; a row holds errors, or the text of what it raised."""
    cases = [(shape, make(shape, device, dtype)) for shape in shapes]
    expected = [reference(x) for _, x in cases]
    for contender in found:
        for (shape, x), truth in list(zip(cases, expected))[: contender.checks]:
            if not contender.takes(shape):
                continue
            row = {"check": contender.name, "shape": str(shape), **asdict(shape)}
            try:
                good, errors = check(contender.call, x, truth)
            except FAILURES as error:
                yield {**row, "good": False, "error": describe(error)}
            else:
                yield {**row, "good": good, "errors": errors}


@torch.no_grad()
def check_cache(device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """One row for decoding a token and one for prefilling five, from half empty caches."""
    for tokens in (1, 5):
        shape = replace(SMALL, tokens=512)
        x = make(shape, device, dtype)
        positions_BS = torch.arange(512, device=device).expand(2, -1)
        arguments = {
            "q_positions_BT": positions_BS[:, 300 : 300 + tokens],
            "k_positions_BS": torch.where(positions_BS < 300 + tokens, positions_BS, -1),
        }
        o = attention(x.q[:, :tokens], x.k, x.v, **arguments)
        exact = (y.double() for y in (x.q[:, :tokens], x.k, x.v))
        truth = attention(*exact, backend="reference", **arguments)
        error = ((o.double() - truth).norm() / truth.norm()).item()
        name = f"cache, {tokens} tokens"
        row = {"check": name, "shape": str(shape), **asdict(shape)}
        yield {**row, "good": error < LIMITS[dtype][0], "errors": {"o": error}}


def run_times(
    found: list[Contender],
    shapes: list[Shape],
    device: torch.device,
    dtype: torch.dtype,
    peaks: tuple[float, float] | None,
    repeats: int,
) -> Iterator[dict]:
    """One row per contender and shape, with times and shares of the floor, or an error's text."""
    for contender, shape in itertools.product(found, shapes):
        if not contender.timed or not contender.takes(shape):
            continue
        x = make(shape, device, dtype)
        row = {"time": contender.name, "shape": str(shape), **asdict(shape)}
        forward = functools.partial(contender.call, x.q, x.k, x.v, **x.arguments)
        try:
            forward_ms = median_ms(forward, device, repeats)
            both_ms = median_ms(functools.partial(gradients, contender.call, x), device, repeats)
        except FAILURES as error:
            yield {**row, "error": describe(error)}
            continue
        yield {**row, "forward_ms": forward_ms, "both_ms": both_ms, **floors(shape, x, peaks)}


def describe(error: BaseException) -> str:
    """The error's type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def line(row: dict) -> str:
    """A row for the console."""
    kind = "check" if "check" in row else "time"
    head = f"{kind:6}{row[kind]:18}{row['shape']:48}"
    if "error" in row:
        return head + row["error"]
    if kind == "check":
        errors = " ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        return head + ("ok    " if row["good"] else "WRONG ") + errors
    for part in ("forward", "both"):
        head += f"{part} {row[f'{part}_ms']:8.3f} ms "
        if f"{part}_floor_ms" in row:
            head += f"{row[f'{part}_floor_ms'] / row[f'{part}_ms']:4.0%} of floor  "
    return head


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for all rows")
    parser.add_argument("--device", default="cuda", help="cuda | cpu")
    parser.add_argument("--only", nargs="+", help="contenders to run, such as auto varlen flex")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=120.0, help="start no row after so long, s")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    name = torch.cuda.get_device_name() if cuda else "cpu"
    peaks = next((value for key, value in PEAKS.items() if key in name), None)
    found = contenders(device)
    if options.only:
        found = [contender for contender in found if contender.name in options.only]
    print(f"{name}, torch {torch.__version__}, {dtype}, peaks {peaks}", flush=True)
    rows: list[dict] = []

    def collect(source: Iterator[dict]) -> None:
        while time.monotonic() - start < options.budget:
            row = next(source, None)
            if row is None:
                return
            rows.append(row)
            print(f"{time.monotonic() - start:6.1f} s {line(row)}", flush=True)
        print(f"stopped: the budget of {options.budget:.0f} s is spent", flush=True)

    collect(run_checks(found, QUICK_CHECKED if options.quick else CHECKED, device, dtype))
    collect(check_cache(device, dtype))
    # What is wrong anywhere is not timed; what cannot run a shape says so again.
    wrong = {row["check"] for row in rows if "errors" in row and not row["good"]}
    checked = {row["check"] for row in rows}
    sound = [c for c in found if c.name in checked - wrong]
    shapes = QUICK_TIMED if options.quick else TIMED
    collect(run_times(sound, shapes, device, dtype, peaks, options.repeats))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "peaks": peaks}
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
