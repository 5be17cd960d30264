"""`llmtrain bench kernels`: the cases of llmtrain_kernels.bench; kernels.json.

Each is checked against float64 before it is timed; ends with code 1 when one of ours is wrong.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from llmtrain_kernels.bench import harness
from llmtrain_kernels.bench.case import Case
from llmtrain_kernels.bench.floor import measure
from llmtrain_kernels.bench.kernels import KERNELS

from llmtrain.bench.command import choose, machine, write

# Relative error that ours may have whatever the peers have.
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def bench_kernels(config: dict, device: torch.device, out: Path) -> int:
    """Print every case; kernels.json is written anew after each."""
    quick = config["quick"] or device.type == "cpu"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    floor = measure(device, copied=2**20, side=256) if quick else measure(device)
    print(f"copy {floor.bytes_per_second:.3g} bytes/s, product {floor.flops_per_second:.3g} FLOP/s")
    write(out / "machine.json", {**machine(device), "dtype": str(dtype), **vars(floor)})
    began, rows, faults = time.monotonic(), [], []
    write(out / "kernels.json", rows)
    for case in cases(choose("only", config["only"], KERNELS), quick):
        if time.monotonic() - began > config["budget"]:
            print(f"left out, the budget was spent: {case.kernel} {case.shape}", flush=True)
            continue
        case = case if config["peers"] else replace(case, peers={})
        rows.append(harness.run(case, device, dtype, floor))
        print("\n".join(harness.lines(rows[-1])), flush=True)
        fault = harness.wrong(rows[-1], case.error or LIMITS[dtype])
        if fault is not None:
            faults.append(f"WRONG: {case.kernel} {case.shape}: {fault}")
        write(out / "kernels.json", rows)
    print("\n".join(faults))
    return 1 if faults else 0


def cases(kernels: list[str], quick: bool) -> Iterator[Case]:
    for kernel in kernels:
        yield from importlib.import_module(f"llmtrain_kernels.bench.{kernel}").cases(quick)
