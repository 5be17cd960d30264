"""Milliseconds of a call: what the device takes, and what a program that calls it waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, REPEATS, SECONDS = 5, 60, 0.5
CACHE_BYTES = 256 * 2**20  # written before each call: more than the second-level cache of any GPU


def eager_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median of calls from Python, launches included, with a cold cache."""
    return median_ms(call, device)


def device_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median of replays of a CUDA graph of the call: no launches to wait for. RuntimeError when
    the call cannot be captured: it is tried first whether it waits for the device, since memory
    that a broken capture holds is not given back. On a CPU the same as eager_ms."""
    if device.type != "cuda":
        return median_ms(call, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    taken = median_ms(graph.replay, device)
    graph.reset()
    return taken


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return statistics.median(wall_ms(call) for _ in range(5))
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    began, pairs = time.perf_counter(), []
    while len(pairs) < REPEATS and time.perf_counter() - began < SECONDS:
        flush.zero_()
        pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
        if len(pairs) % 10 == 0:
            torch.cuda.synchronize()  # so that the deadline means something
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def wall_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
