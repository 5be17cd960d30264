"""Measure launch configurations on this device and pin the fastest (llmtrain_kernels/launch).

    python kernels/bench/tune.py                          every kernel, into launch/<device>.toml
    python kernels/bench/tune.py --only norm --out /tmp/h100.toml --report /tmp/tune.json

For each kernel and shape of the benchmarks' modules (tunings()) every candidate is run once, a
candidate that does not compile or fit is left out, and the fastest is pinned; of those within 1 %
the first in the list, so that two runs give one table. Before that, --processes compile them all,
which leaves them in Triton's cache. Results must be the same whatever is pinned: the kernels' tests
say so, not this program. Kernels that were not tuned keep their entries.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llmtrain_kernels import launch
from llmtrain_kernels.bench.kernels import KERNELS
from llmtrain_kernels.bench.timing import device_ms

EQUAL = 1.01  # times that far apart count as one
Config = dict[str, int]


def measure(
    candidates: list[Config], run: Callable[[Config], object], device: torch.device
) -> Iterator[tuple[Config, float | str]]:
    """Each candidate with its milliseconds, or why it cannot run."""
    for config in candidates:
        try:
            run(config)
            yield config, device_ms(lambda config=config: run(config), device)
        except Exception as error:  # compilers and drivers raise many kinds
            yield config, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def compile_one(module_name: str, index: int, device: torch.device) -> None:
    """Every candidate of one of a module's tunings is run once; those that fail, fail later too."""
    module = importlib.import_module(f"llmtrain_kernels.bench.{module_name}")
    kernel, _, run = list(module.tunings(device))[index]
    for config in module.candidates()[kernel]:
        try:
            run(config)
        except Exception:  # measure() says why
            continue
    torch.cuda.synchronize()
    del run
    torch.cuda.empty_cache()


def compile_all(names: list[str], device: torch.device, processes: int) -> None:
    modules = [(name, importlib.import_module(f"llmtrain_kernels.bench.{name}")) for name in names]
    tasks = [(name, i) for name, m in modules for i, _ in enumerate(m.tunings(device))]
    torch.cuda.empty_cache()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in [pool.submit(compile_one, *task, device) for task in tasks]:
            future.result()


def fastest(found: list[tuple[Config, float | str]]) -> Config | None:
    """The first within EQUAL of the best; None when none runs."""
    times = [(config, ms) for config, ms in found if isinstance(ms, float)]
    best = min((ms for _, ms in times), default=0.0)
    return next((config for config, ms in times if ms <= EQUAL * best), None)


def entries(chosen: dict[int, Config]) -> list[Config]:
    """size -> configuration as a table's entries: neighbours that agree are one class."""
    made: list[Config] = []
    for size in sorted(chosen):
        if made and {k: v for k, v in made[-1].items() if k != "up_to"} == chosen[size]:
            made.pop()
        made.append({"up_to": size, **chosen[size]})
    made[-1].pop("up_to")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="TOML file; default: the device's own")
    parser.add_argument("--report", type=Path, help="JSON file for every time")
    parser.add_argument("--budget", type=float, default=300.0, help="start no shape after, seconds")
    parser.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 16), help="that compile; 0: none"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    short = next((word for word in name.lower().split() if word[-1:].isdigit()), launch.DEFAULT)
    began, report, left_out = time.monotonic(), [], []
    chosen: dict[str, dict[int, Config]] = {}
    if device.type == "cuda" and options.processes:
        compile_all(options.only, device, options.processes)
        print(f"{time.monotonic() - began:6.1f} s compiled", flush=True)
    for module_name in options.only:
        module = importlib.import_module(f"llmtrain_kernels.bench.{module_name}")
        candidates = module.candidates()
        for kernel, size, run in module.tunings(device):
            if time.monotonic() - began > options.budget:
                left_out.append(f"{kernel} {size}")
                continue
            found = list(measure(candidates[kernel], run, device))
            report += [{"kernel": kernel, "size": size, "config": c, "ms": ms} for c, ms in found]
            best = fastest(found)
            print(f"{time.monotonic() - began:6.1f} s {kernel} {size}: {best}", flush=True)
            if best is None:
                print("\n".join(f"  {config}: {why}" for config, why in found))
            else:
                chosen.setdefault(kernel, {})[size] = best
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    path = options.out or launch.FOLDER / f"{short}.toml"
    kept = launch.tables(path.stem) if path == launch.FOLDER / path.name and path.exists() else {}
    tables = {**kept, **{kernel: entries(sizes) for kernel, sizes in chosen.items()}}
    heading = f"Written by kernels/bench/tune.py on an {name}, torch {torch.__version__}."
    launch.write(path, tables, heading=heading)
    if left_out:
        print(f"left out, no time: {', '.join(left_out)}", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
