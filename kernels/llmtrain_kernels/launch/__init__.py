"""Launch configurations, pinned: nothing is tuned while a model trains.

One TOML file a device; a table a kernel; an entry a class of shapes, in order of `up_to`, the
largest size that it serves (the last has none and serves the rest). Which size that is says the
kernel's file. The other keys go to the kernel as they are: block sizes, num_warps, num_stages.

    [[rms_norm_fwd]]
    up_to = 2048
    rows = 4
    num_warps = 4
    num_stages = 1

kernels/bench/tune.py measures the candidates on a device and writes its file. A device without a
file, and a kernel that its file does not have, take default.toml.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from types import MappingProxyType

import torch

FOLDER = Path(__file__).parent
DEFAULT = "default"


def launch(kernel: str, device: torch.device, size: int) -> dict[str, int]:
    """The keyword arguments of a kernel's launch for a shape of this size."""
    return dict(pinned(kernel, device_name(device), size))


@functools.cache
def device_name(device: torch.device) -> str:
    """The stem of the device's file: h100 for an "NVIDIA H100 80GB HBM3"."""
    if device.type != "cuda":
        return DEFAULT
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    return next((word for word in words if (FOLDER / f"{word}.toml").exists()), DEFAULT)


@functools.cache
def pinned(kernel: str, device: str, size: int) -> MappingProxyType[str, int]:
    """One entry, without up_to. KeyError for a kernel that no file has."""
    entries = tables(device).get(kernel) or tables(DEFAULT)[kernel]
    entry = next(entry for entry in entries if size <= entry.get("up_to", size))
    return MappingProxyType({key: value for key, value in entry.items() if key != "up_to"})


@functools.cache
def tables(device: str) -> dict[str, list[dict[str, int]]]:
    """A device's file. ValueError when a kernel's entries are not in order, or serve not all."""
    path = FOLDER / f"{device}.toml"
    read = tomllib.loads(path.read_text(encoding="utf-8"))
    for kernel, entries in read.items():
        bounds = [entry.get("up_to") for entry in entries]
        if bounds[-1] is not None or None in bounds[:-1] or bounds[:-1] != sorted(bounds[:-1]):
            raise ValueError(
                f"{path}: got {kernel} with up_to {bounds}, expected rising sizes and a last entry "
                "without up_to; mend the table or write it anew with kernels/bench/tune.py"
            )
    return read


def write(path: Path, read: dict[str, list[dict[str, int]]], *, heading: str) -> None:
    """Write a device's file. heading: comment lines, what was measured where."""
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for kernel in sorted(read):
        for entry in read[kernel]:
            lines += ["", f"[[{kernel}]]", *(f"{key} = {value}" for key, value in entry.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
