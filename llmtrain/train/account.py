"""Where the time of a training step went, as one page: profile.md.

Kernels are told apart by their names (KINDS, the first match counts). On a GPU an instant belongs
to the first kind of KINDS that runs in it, so that the parts and the idle time add up to the step,
and communication counts only where nothing else hid it. On a CPU it is each operation's own time.

    floor of matmul, attention     their FLOPs at the device's bf16 peak (accounting.py)
    floor of optimizer             28 bytes a parameter (AdamW: reads weight, gradient and moments,
                                   writes weight and moments) at the memory's peak
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrain import accounting

# Kind -> names of kernels (CUDA, Triton, ATen operations on a CPU).
KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|attn|flex_"),
    ("optimizer", r"adam|muon|newton_schulz|multi_tensor_apply|_foreach_|lpnorm"),
    (
        "communication",
        r"nccl|all_?reduce|all_?gather|reduce_?scatter|broadcast_coalesced|gloo|c10d",
    ),
    (
        "matmul",
        r"gemm|nvjet|cutlass|cublas|wgmma|triton_tem|xmma|mma_|_mm\b|::(add|b|badd)?mm\b|::mv\b|"
        r"::linear\b|::matmul\b|linear_cross_entropy|scaled_mm|grouped_mm|mkldnn",
    ),
    ("copies", r"memcpy|memset|copy_kernel|::copy_|::_to_copy|::fill_|::zero_|Memcpy|Memset"),
    ("memory-bound", r""),
)
NAMES = tuple(kind for kind, _ in KINDS)
# In which order kinds own an instant at which several run.
OWNERS = ("matmul", "attention", "optimizer", "memory-bound", "copies", "communication")
ADAMW_BYTES = 28  # a parameter
# Memory bandwidth in bytes a second, from NVIDIA's data sheets. First match wins.
BANDWIDTH = (
    (r"B[23]00|GB[23]00", 8.0e12),
    (r"H200|GH200", 4.8e12),
    (r"H100 PCIe", 2.0e12),
    (r"H100 NVL", 3.9e12),
    (r"H100|H800", 3.35e12),
    (r"H20", 4.0e12),
    (r"A100", 2.0e12),
    (r"L40S", 0.864e12),
)
TOP, GAPS = 15, 5  # rows of the lists of kernels and of idle gaps


@dataclass(frozen=True, kw_only=True)
class Event:
    """A kernel, or an operation of a CPU. Microseconds; on a CPU end - start is its own time."""

    name: str
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step must do. flops, attention_flops: of it (attention: what grows with the length of
    rows; 0 for none), params: that are updated on this rank; device: its name."""

    flops: float
    attention_flops: float
    params: int
    tokens: int
    device: str


def kind_of(name: str) -> str:
    """The kind of a kernel: of several that match, the first in KINDS."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def bandwidth(device: str) -> float | None:
    """Bytes a second of a device's memory, None if unknown."""
    return next(
        (rate for pattern, rate in BANDWIDTH if re.search(rf"\b({pattern})\b", device)), None
    )


def attention_flops(per_token: float, per_token_short: float) -> float:
    """Training FLOPs a token that are there only because rows are long."""
    return max(0.0, per_token - per_token_short)


def owned(events: Sequence[Event]) -> dict[str, float]:
    """Kind -> microseconds in which it runs and no kind does that comes before it in OWNERS."""
    by_kind = defaultdict(list)
    for event in events:
        by_kind[kind_of(event.name)].append((event.start, event.end))
    taken: list[tuple[float, float]] = []
    times, before = {}, 0.0
    for kind in OWNERS:
        taken = union([*taken, *by_kind[kind]])
        now = sum(end - start for start, end in taken)
        times[kind], before = now - before, now
    return times


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same instants as spans that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def own_times(events: Sequence[Event]) -> dict[str, float]:
    """Kind -> microseconds, where events never hold others' time."""
    times = dict.fromkeys(OWNERS, 0.0)
    for event in events:
        times[kind_of(event.name)] += event.length
    return times


def floors(work: Work) -> dict[str, float]:
    """Kind -> microseconds a step below which the device does not get; empty if it is unknown."""
    peak, rate = accounting.peak_flops(work.device), bandwidth(work.device)
    found = {}
    if peak is not None:
        found["matmul"] = 1e6 * (work.flops - work.attention_flops) / peak
        found["attention"] = 1e6 * work.attention_flops / peak
    if rate is not None:
        found["optimizer"] = 1e6 * ADAMW_BYTES * work.params / rate
    return found


def gaps(events: Sequence[Event]) -> list[tuple[float, str, str]]:
    """The longest idle stretches: microseconds, the kernel before and the one after."""
    found = []
    last: Event | None = None
    for event in sorted(events, key=lambda event: event.start):
        if last is not None and event.start > last.end:
            found.append((event.start - last.end, last.name, event.name))
        if last is None or event.end > last.end:
            last = event
    return sorted(found, reverse=True)[:GAPS]


def page(
    events: Sequence[Event], *, wall: float, steps: int, work: Work, concurrent: bool, note: str
) -> str:
    """profile.md. wall: microseconds that the steps took; concurrent: events may overlap (a GPU);
    note: what was profiled."""
    times = owned(events) if concurrent else own_times(events)
    times["idle"] = max(0.0, wall - sum(times.values()))
    lowest = floors(work)
    lines = [
        "# Where the time of a step went",
        "",
        note,
        "",
        f"{wall / steps / 1e3:,.2f} ms a step, {1e6 * steps * work.tokens / wall:,.0f} tokens/s"
        + utilisation(work, wall / steps)
        + f"; {steps} steps, {len(events) // steps:,} kernels a step.",
        "",
        "| part | ms a step | share | floor ms | of its floor |",
        "|---|---|---|---|---|",
    ]
    for part in (*sorted(OWNERS, key=lambda kind: -times[kind]), "idle"):
        taken, floor = times[part] / steps, lowest.get(part)
        reached = "-" if floor is None or not taken else f"{floor / taken:.0%}"
        shown = "-" if floor is None else f"{floor / 1e3:,.2f}"
        lines.append(
            f"| {part} | {taken / 1e3:,.2f} | {times[part] / wall:.1%} | {shown} | {reached} |"
        )
    lines += ["", "## Kernels", "", "| ms a step | launches | part | kernel |", "|---|---|---|---|"]
    lines += kernel_rows(events, steps)
    if concurrent and (found := gaps(events)):
        lines += ["", "## Longest idle stretches", "", "| ms | after | before |", "|---|---|---|"]
        lines += [f"| {gap / 1e3:.3f} | {short(a)} | {short(b)} |" for gap, a, b in found]
    return "\n".join(lines) + "\n"


def utilisation(work: Work, step: float) -> str:
    peak = accounting.peak_flops(work.device)
    return "" if peak is None else f", MFU {1e6 * work.flops / step / peak:.1%}"


def kernel_rows(events: Sequence[Event], steps: int) -> list[str]:
    total, count = Counter(), Counter()
    for event in events:
        total[event.name] += event.length
        count[event.name] += 1
    rows = []
    for name, time in total.most_common(TOP):
        each = f"{time / steps / 1e3:.3f} | {count[name] / steps:.0f}"
        rows.append(f"| {each} | {kind_of(name)} | {short(name)} |")
    return rows


def short(name: str) -> str:
    """A kernel's name for a table."""
    return name.replace("|", "/").replace("\n", " ")[:90]
