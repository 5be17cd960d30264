"""Save and load bandwidth of checkpoints beside the disk's own (dd with fsync), and the stall.

    python scripts/checkpoint_bandwidth.py --folder runs --gib 2 --ranks 1 2 --out results/<name>

For each number of ranks and each cut of the weights (large: matrices of a model; small: fragments
of 64 KiB), all in turn, `repeats` times over:

    dd write    one dd a rank, together --gib of random bytes: bs=64M conv=fsync
    save        what train.async_save does: host copy (the stall), then files, fsync, commit
    dd read     the files of dd write, bs=64M
    load        what a resume does: every rank fills its fragments and verifies (sha256 of every
                byte) its share of the files, from one read
    load again  the same with the page cache warm: the disk left out
    sha256      as many bytes hashed in memory: what the processors allow a load, at most

Reads follow a dropped page cache (/proc/sys/vm/drop_caches) where that is permitted; else the
report says so. Writes bandwidth.json and prints a table of medians. A minute's worth of it:
--gib 0.5 --ranks 1 --cuts large --repeats 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain import checkpoint, distributed
from llmtrain.checkpoint import Wanted
from llmtrain.distributed import World, broadcast_object, gather_objects
from llmtrain.manifest import CHUNK_BYTES, THREADS
from llmtrain.train.checkpoint import CheckpointWriter, hash_chunk
from llmtrain.train.partitions import Fragment
from llmtrain.train.saving import Saver

KINDS = ("param", "exp_avg", "exp_avg_sq")
LARGE = 4096 * 4096
SMALL = 64 * 2**10 // 4
MEASURED = ("dd write", "save", "dd read", "load", "load again", "sha256", "stall")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, required=True, help="where bandwidth.json goes")
    parser.add_argument("--gib", type=float, default=2.0, help="of a checkpoint, over all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cuts", nargs="+", default=["large", "small"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def shapes(cut: str, gib: float) -> dict[str, tuple[int, ...]]:
    """Parameters whose three kinds together have that size in float32."""
    left = int(gib * 2**30 / 4 / len(KINDS))
    whole = {"large": LARGE, "small": SMALL}[cut]
    found = {}
    while left > 0:
        numel = min(left, whole)
        found[f"model.layers.{len(found)}.weight"] = (numel,)
        left -= numel
    return found


def fragments(parameters: dict[str, tuple[int, ...]], world: World, device: str) -> list[Fragment]:
    """This rank's slice of every parameter: one random block, each time plus a number."""
    found, block = [], torch.randn(LARGE, device=device)
    for name, (numel,) in parameters.items():
        start, end = (numel * r // world.size for r in (world.rank, world.rank + 1))
        values = block[: end - start] + len(found)
        views = {kind: values + number / 4 for number, kind in enumerate(KINDS)}
        found.append(Fragment(name=name, offset=start, views=views))
    return found


def write_source(path: Path, size: int) -> None:
    """That many bytes that neither repeat nor are zero, which would be too easy for some disks: one
    random block, each time plus a number."""
    draw = torch.Generator().manual_seed(0)
    block = torch.randint(2**31, (2**23,), dtype=torch.int64, generator=draw)
    with path.open("wb") as file:
        for number in range(-(-size // block.nbytes)):
            file.write(memoryview((block + number * 2**32).numpy()))


class Bench:
    """One rank of a measurement; every method is called by all ranks."""

    def __init__(self, options: argparse.Namespace, world: World, cut: str):
        self.options, self.world, self.cut = options, world, cut
        self.folder = options.folder / f"bandwidth-{cut}-{world.size}"
        self.device = f"cuda:{world.local_rank}" if options.device == "cuda" else "cpu"
        self.parameters = shapes(cut, options.gib)
        self.fragments = fragments(self.parameters, world, self.device)
        self.share = sum(v.nbytes for f in self.fragments for v in f.views.values())
        self.bytes = sum(gather_objects(self.share, world))
        self.first(lambda: self.folder.mkdir(parents=True))
        self.source = Path("/dev/shm") / f"bandwidth-{os.getpid()}"
        write_source(self.source, self.share)
        writer = CheckpointWriter(
            self.folder,
            world,
            config={},
            keep=1,
            vocab_size=1,
            parameters=self.parameters,
            corpus_files={},
            group=distributed.side_group(world, distributed.TIMEOUT),
        )
        self.saver = Saver(writer, background=True, failures=1)
        self.saver.reserve(self.fragments, {})
        self.step, self.cold = 0, True

    def first(self, action: Callable[[], object]) -> None:
        """Rank 0 acts, others wait."""
        if self.world.rank == 0:
            action()
        broadcast_object(None, self.world)

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds from when all ranks begin until all have ended."""
        broadcast_object(None, self.world)
        gather_objects(None, self.world)
        began = time.perf_counter()
        action()
        gather_objects(None, self.world)
        return time.perf_counter() - began

    def dd(self, *words: str) -> None:
        subprocess.run(["dd", "bs=64M", *words], check=True, capture_output=True)

    def drop_caches(self) -> None:
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            self.cold = False

    def load(self) -> None:
        """What a resume does: verify together, and fill this rank's tensors."""
        path = self.saver.writer.path(self.step)
        found = checkpoint.problems_but_tensors(path) if self.world.rank == 0 else []
        wanted = [
            Wanted(kind=kind, name=fragment.name, offset=fragment.offset, out=view)
            for fragment in self.fragments
            for kind, view in fragment.views.items()
        ]
        found += checkpoint.load(path, wanted, rank=self.world.rank, size=self.world.size)
        assert not any(gather_objects(found, self.world)), found

    def hash(self) -> None:
        """This rank's bytes, by the threads that verify."""
        memory = memoryview(self.saver.memory.bytes.numpy())
        with ThreadPoolExecutor(THREADS) as pool:
            starts = range(0, len(memory), CHUNK_BYTES)
            list(pool.map(lambda at: hash_chunk(memory[at : at + CHUNK_BYTES]), starts))

    def save(self) -> None:
        self.saver.save(self.step, self.fragments, {}, {"step": self.step})
        self.stall = self.saver.latest.stall_seconds
        self.saver.finish()

    def repeat(self) -> dict[str, float]:
        """Bytes per second of everything; seconds of the stall."""
        self.step += 1
        seconds = {}
        written = self.folder / f"dd-{self.world.rank}"
        seconds["dd write"] = self.timed(
            lambda: self.dd(f"if={self.source}", f"of={written}", "conv=fsync")
        )
        seconds["save"] = self.timed(self.save)
        self.first(self.drop_caches)
        seconds["dd read"] = self.timed(lambda: self.dd(f"if={written}", "of=/dev/null"))
        self.first(self.drop_caches)
        before = [view.sum() for f in self.fragments[:4] for view in f.views.values()]
        for fragment in self.fragments:
            for view in fragment.views.values():
                view.zero_()
        seconds["load"] = self.timed(self.load)
        seconds["load again"] = self.timed(self.load)
        seconds["sha256"] = self.timed(self.hash)
        assert before == [view.sum() for f in self.fragments[:4] for view in f.views.values()]
        written.unlink()
        return {name: self.bytes / took for name, took in seconds.items()} | {"stall": self.stall}

    def close(self) -> None:
        self.source.unlink()
        self.saver.close()
        self.first(lambda: shutil.rmtree(self.folder))


def work(options: argparse.Namespace) -> None:
    """As one rank: measure every cut; rank 0 prints a JSON line each."""
    world = distributed.discover(os.environ)
    device = distributed.choose_device(options.device, world)
    distributed.start(world, device)
    for cut in options.cuts:
        bench = Bench(options, world, cut)
        bench.repeat()  # once for the disk's and the allocator's first time
        repeats = [bench.repeat() for _ in range(options.repeats)]
        if world.rank == 0:
            result = {
                "ranks": world.size,
                "cut": cut,
                "bytes": bench.bytes,
                "fragments": len(bench.parameters) * len(KINDS),
                "cold_reads": bench.cold,
                "repeats": repeats,
                **{name: statistics.median(r[name] for r in repeats) for name in MEASURED},
            }
            result["save / dd"] = statistics.median(r["save"] / r["dd write"] for r in repeats)
            result["load / dd"] = statistics.median(r["load"] / r["dd read"] for r in repeats)
            print("RESULT", json.dumps(result), flush=True)
        bench.close()
    if dist.is_initialized():
        dist.barrier()


def table(results: list[dict]) -> str:
    titles = "ranks | fragments | dd write | save | ratio | dd read | load | ratio | warm | sha256"
    rows = [f"| {titles} | stall |", "|" + "---|" * 11]
    for r in results:
        rates = {name: f"{r[name] / 1e6:,.0f} MB/s" for name in MEASURED}
        rows.append(
            f"| {r['ranks']} | {r['fragments']} | {rates['dd write']} | {rates['save']} | "
            f"{r['save / dd']:.0%} | {rates['dd read']} | {rates['load']} | {r['load / dd']:.0%} | "
            f"{rates['load again']} | {rates['sha256']} | {r['stall']:.2f} s |"
        )
    return "\n".join(rows)


def main() -> None:
    options = arguments()
    if "BANDWIDTH_WORKER" in os.environ:
        work(options)
        return
    results = []
    for size in options.ranks:
        place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(distributed.free_port()), "BANDWIDTH_WORKER": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        printed = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit(f"{size} ranks: one of them failed: {''.join(printed)}")
        lines = [line for line in printed[0].splitlines() if line.startswith("RESULT ")]
        results += [json.loads(line.removeprefix("RESULT ")) for line in lines]
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"gib": options.gib, "device": options.device, "results": results}
    (options.out / "bandwidth.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    if not all(result["cold_reads"] for result in results):
        print("reads may have come from the page cache: it could not be dropped here")


if __name__ == "__main__":
    main()
