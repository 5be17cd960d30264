"""The node check on one rank: measures, and prints what it found as lines of JSON.

    python -m llmtrain.slurm.probes <wanted: JSON>   under srun, or started by preflight.py

The first line says what this rank knows alone, the second adds what it measured with the others; so
a rank that hangs in an exchange has still said something. What is good enough, verdict.py decides.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llmtrain import distributed
from llmtrain.distributed import World
from llmtrain.slurm.verdict import MARK

# Sides of the square matrices that are multiplied; elements that are exchanged; bytes on the disk.
SIDE = {"cuda": 8192, "cpu": 512}
ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 20}
FILE_BYTES = 32 << 20
REPEATS = 5
# Fields of nvidia-smi, asked for one by one: a driver refuses a query with a name it lacks.
ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
    "retired_pages.pending": "memory pages wait to be retired",
    "remapped_rows.pending": "memory rows wait to be remapped",
    "remapped_rows.failure": "memory rows could not be remapped",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by its power supply",
}


def main(arguments: list[str]) -> int:
    wanted = json.loads(arguments[0])
    world = distributed.discover(os.environ)
    found = {
        "rank": world.rank,
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    }
    device = torch.device("cuda" if wanted["gpus"] else "cpu")
    try:
        device = distributed.choose_device(device.type, world)
        found |= alone(wanted, world, device)
    except Exception as error:  # the border of the process: whatever it is, it is the finding
        found["error"] = words(error)
    tell(found)
    try:
        if world.size > 1:
            found |= together(wanted, world, device, well="error" not in found)
    except Exception as error:  # as above
        found["group_error"] = words(error)
    tell(found | {"done": True})
    return 0


def words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def tell(found: dict) -> None:
    print(MARK + json.dumps(found), flush=True)


def alone(wanted: dict, world: World, device: torch.device) -> dict:
    """What this rank finds without the others; the first rank of a node also looks at the disk, the
    code and all GPUs."""
    found: dict = {"versions": versions(), "gemm_tflops": gemm(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    if world.local_rank:
        return found
    found["disk"] = disk(Path(wanted["run_dir"]), world.rank)
    if wanted["gpus"]:
        found["gpus"] = torch.cuda.device_count()
        found["gpu_errors"] = gpu_errors()
        found["versions"] |= driver()
    if wanted["code"]:
        from llmtrain.slurm.snapshot import digest

        found["versions"]["code"] = digest(Path(wanted["code"]))[:12]
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def gemm(device: torch.device) -> float:
    """Tera-FLOP/s of a matrix product: bfloat16 on a GPU, float32 on a CPU."""
    side = SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product = left @ right
    best = float("inf")
    for _ in range(REPEATS):
        synchronise(device)
        began = time.perf_counter()
        torch.matmul(left, right, out=product)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    if not bool((product == side).all()):
        raise ArithmeticError(f"a product of matrices of ones, {side} wide, is not {side}")
    return 2 * side**3 / best / 1e12


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def disk(folder: Path, rank: int) -> dict:
    """Free space, and a file written, made durable, and read again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".preflight-{rank}-{os.getpid()}"
    content = os.urandom(1 << 20) * (FILE_BYTES >> 20)
    try:
        began = time.perf_counter()
        with file.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        seconds = time.perf_counter() - began
        if file.read_bytes() != content:
            raise OSError(f"{file}: read back other bytes than were written")
    finally:
        file.unlink(missing_ok=True)
    return {
        "free_gib": shutil.disk_usage(folder).free / 2**30,
        "mib_per_second": FILE_BYTES / 2**20 / seconds,
    }


def nvidia_smi(field: str) -> list[str] | None:
    """A field's value on each GPU; None where nvidia-smi or the field is missing."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else [line.strip() for line in done.stdout.splitlines()]


def gpu_errors() -> list[str]:
    """What nvidia-smi says against the GPUs of this node."""
    found = []
    for field, meaning in ERRORS.items():
        for number, value in enumerate(nvidia_smi(field) or ()):
            if is_error(value):
                found.append(f"GPU {number}: {meaning} ({value})")
    return found


def is_error(value: str) -> bool:
    """Whether a field of nvidia-smi says that there is something: a count, Yes or Active."""
    return value in ("Yes", "Active") or (value.isdigit() and int(value) > 0)


def driver() -> dict[str, str]:
    found = nvidia_smi("driver_version")
    return {"driver": found[0]} if found else {}


def together(wanted: dict, world: World, device: torch.device, *, well: bool) -> dict:
    """What needs the other ranks: clocks, a sum over all, an exchange with the neighbour nodes.
    Nothing, when one of them is not well."""
    join, limit = (timedelta(seconds=share * wanted["timeout_seconds"]) for share in (0.6, 0.25))
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=join))
    store.set(f"here/{world.rank}", "well" if well else "ill")
    missing = absent(store, world, join)
    if missing:
        return {"missing": missing}
    if any(store.get(f"here/{rank}") == b"ill" for rank in range(world.size)):
        return {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        distributed.BACKENDS[device.type],
        store=PrefixStore("preflight", store),
        rank=world.rank,
        world_size=world.size,
        timeout=limit,
    )
    try:
        found = {"clock_seconds": clock(world, device), **all_reduce(world, device)}
        if wanted["nodes"] > 1:
            found["exchange_gbps"] = exchange(world, device, world.size // wanted["nodes"])
    finally:
        distributed.leave()
    return found


def absent(store: Store, world: World, limit: timedelta) -> list[int]:
    """The ranks that do not come within the limit."""
    until = time.monotonic() + limit.total_seconds()
    waiting = list(range(world.size))
    while waiting:
        waiting = [rank for rank in waiting if not store.check([f"here/{rank}"])]
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return waiting


def clock(world: World, device: torch.device) -> float:
    """Seconds that this rank's clock is ahead of rank 0's, to some milliseconds."""
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        times = [torch.empty_like(now) for _ in range(world.size)]
        dist.all_gather(times, now)
        ahead = float(now - times[0])
        best = ahead if abs(ahead) < abs(best) else best
    return best


def all_reduce(world: World, device: torch.device) -> dict:
    """Whether a sum over all ranks is right, and its bus bandwidth in GB/s."""
    elements = ELEMENTS[device.type]
    whole = world.size * (world.size + 1) // 2
    best, right = float("inf"), True
    for _ in range(REPEATS):
        tensor = torch.full((elements,), world.rank + 1.0, device=device)
        dist.barrier()
        synchronise(device)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        synchronise(device)
        best = min(best, time.perf_counter() - began)
        right = right and bool((tensor == whole).all())
    moved = 2 * (world.size - 1) / world.size * elements * 4
    return {"sum_right": right, "all_reduce_gbps": moved / best / 1e9}


def exchange(world: World, device: torch.device, ranks_per_node: int) -> float:
    """GB/s from the same rank of the node before, all nodes at once in a ring."""
    elements = ELEMENTS[device.type] // 4
    sent = torch.full((elements,), float(world.rank), device=device)
    received = torch.empty_like(sent)
    after = (world.rank + ranks_per_node) % world.size
    before = (world.rank - ranks_per_node) % world.size
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        synchronise(device)
        began = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, sent, after),
            dist.P2POp(dist.irecv, received, before),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    if not bool((received == before).all()):
        raise ArithmeticError(f"what came from rank {before} is not what it sent")
    return elements * 4 / best / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
