"""Kernels that every architecture shares, beside their peers, in one run on one device.

    python kernels/bench/dense.py --out results/<name>        (minutes, one GPU)
    python kernels/bench/dense.py --only norm glu --no-peers
    python kernels/bench/dense.py --only attention --shapes T16384 documents

Writes kernels.json, the rows, and machine.json, the device and what it allows, into --out.

Every case is checked against float64 before it is timed; ends with code 1 when one of ours is
wrong. On a CPU the shapes are tiny and only try the script.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llmtrain_kernels.bench import harness
from llmtrain_kernels.bench.floor import measure
from llmtrain_kernels.bench.kernels import KERNELS

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--shapes", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--budget", type=float, default=500.0, help="start no case after, seconds")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    began, rows, faults = time.monotonic(), [], []
    floor = measure(device) if cuda else measure(device, copied=2**20, side=256)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"{name}, torch {torch.__version__}, {dtype}, {floor}", flush=True)
    facts = {"device": name, "torch": torch.__version__, "dtype": str(dtype), **vars(floor)}
    for kernel in options.only:
        for case in importlib.import_module(f"llmtrain_kernels.bench.{kernel}").cases(not cuda):
            if not any(part in case.shape for part in options.shapes):
                continue
            if time.monotonic() - began > options.budget:
                print(f"left out, no time: {case.kernel} {case.shape}", flush=True)
                continue
            case = replace(case, peers={}) if options.no_peers else case
            rows.append(harness.run(case, device, dtype, floor))
            print(f"{time.monotonic() - began:6.1f} s", "\n".join(harness.lines(rows[-1])))
            fault = harness.wrong(rows[-1], case.error or LIMITS[dtype])
            if fault is not None:
                faults.append(f"{case.kernel} {case.shape}: {fault}")
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                for file, content in (("kernels", rows), ("machine", facts)):
                    text = json.dumps(content, indent=1) + "\n"
                    (options.out / f"{file}.json").write_text(text, encoding="utf-8")
    print("\n".join(f"WRONG: {fault}" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
