"""`llmtrain bench step`: a training step of ours beside a bare loop and beside peers.

Every contender has a process of its own and compilers' caches of its own, so that the seconds to
its first optimizer step are those of a cold start; only the bare loop finds what ours compiled.
Ours is `llmtrain train` as a user starts it: its rate is read from metrics.jsonl, and it is killed
when enough is known, before it would write a checkpoint.

step.json: a list of {model, params, T, micro_batch, ours, peers, bare_loop,
bare_loop_tokens_per_s}; contenders: {tokens_per_s, mfu, peak_gib, first_step_s} or {error}; ours
tells first_step_parts, where the seconds to its first step went. MFU counts our model's FLOPs for
all, since all train a model of that size.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmtrain import accounting
from llmtrain.bench.command import choose, write
from llmtrain.bench.contender import CONTENDERS, absent
from llmtrain.bench.corpus import write_random
from llmtrain.bench.entries import ENTRIES, QUICK, Entry
from llmtrain.config import compose

STEPS = 4  # of a stretch
POLL = 0.05  # seconds
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def bench_step(config: dict, device: torch.device, out: Path) -> int:
    """Run and print everything; step.json is written anew after each contender."""
    entries = {entry.name: entry for entry in (QUICK if config["quick"] else ENTRIES)}
    contenders = choose("contenders", config["contenders"], CONTENDERS)
    began, rows = time.monotonic(), []
    for name in choose("only", config["only"], list(entries)):
        with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as folder:
            run = EntryRun(entries[name], config, device, Path(folder))
            rows.append(run.row)
            print(
                f"{name}: {run.row['params']:,} parameters, {run.row['step_tokens']:,} tokens "
                f"a step, T {run.row['T']}",
                flush=True,
            )
            for contender in contenders:
                if time.monotonic() - began > config["budget"]:
                    run.note(contender, {"error": "left out: the budget was spent"})
                else:
                    run.note(contender, run.measure(contender))
                    print(line(contender, run.found[contender]), flush=True)
                layer_costs(rows, entries)
                write(out / "step.json", rows)
            print(summary(run.row), flush=True)
    return 0


class EntryRun:
    """All contenders of one entry, in folder. row: as in step.json."""

    def __init__(self, entry: Entry, config: dict, device: torch.device, folder: Path):
        self.entry, self.config, self.device, self.folder = entry, config, device, folder
        options = {
            "precision": "fp32" if config["quick"] else config["precision"],
            "compile_mode": "none" if config["quick"] else config["compile"],
        }
        self.overrides = entry.overrides(**options)
        self.train = compose("train", [*self.overrides, "train.total_tokens=1000000000"])
        self.facts = entry.facts(self.train)
        self.found: dict[str, dict] = {}
        self.row: dict = {
            "model": entry.name,
            "params": self.facts["params"],
            "T": entry.seq_len,
            "micro_batch": entry.micro_batch,
            "micro_steps": entry.micro_steps,
            "step_tokens": entry.step_tokens,
            **options,
            "changes": config["changes"],
            "ours": {},
            "peers": {},
            "bare_loop_tokens_per_s": None,
        }

    def note(self, contender: str, found: dict) -> None:
        """Put a contender's result where it belongs."""
        self.found[contender] = found
        if contender == "ours":
            self.row["ours"] = found
        elif contender == "bare":
            self.row["bare_loop"] = found
            self.row["bare_loop_tokens_per_s"] = found.get("tokens_per_s")
        else:
            self.row["peers"][contender] = found

    def measure(self, contender: str) -> dict:
        reason = absent(contender)
        if reason is not None:
            return {"error": reason}
        result = self.ours() if contender == "ours" else self.other(contender)
        if "error" in result:
            return result
        rate = self.entry.step_tokens / result["step_seconds"]
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        mfu = accounting.mfu(rate, self.facts["flops_per_token"], name)
        return {"tokens_per_s": rate, "mfu": mfu, **result}

    def ours(self) -> dict:
        """`llmtrain train` until it has written enough intervals."""
        corpus, run_dir = self.folder / "random", self.folder / "ours"
        tokens = 4 * self.entry.step_tokens + 1
        write_random(corpus, vocab_size=self.entry.vocab, tokens=tokens)
        steps = STEPS * (2 + self.config["intervals"])
        command = [
            *(sys.executable, "-m", "llmtrain.cli", "train", *self.overrides),
            *(f"data.root={self.folder}", "data.name=random", f"run_dir={run_dir}"),
            f"train.total_tokens={10 * steps * self.entry.step_tokens}",
            *(f"train.log_every={STEPS}", f"train.device={self.device.type}"),
            *("train.val_every=1000000", "train.save_every=1000000"),
            *("train.resume=never", "tracker=none", *self.config["changes"]),
        ]
        wanted = 1 + self.config["intervals"]
        with self.started("ours", command) as process:
            first = None
            while process.alive():
                if first is None and any("applied" in line for line in lines(run_dir, "ledger")):
                    first = process.seconds()
                trained = [x for x in lines(run_dir, "metrics") if x["kind"] == "train"]
                if first is not None and len(trained) >= wanted:
                    steady = trained[1:wanted]  # the first holds compilations of later steps
                    return {
                        "step_seconds": statistics.median(x["step_seconds"] for x in steady),
                        "peak_gib": steady[-1]["memory_gib"],
                        "first_step_s": first,
                        "first_step_parts": process.told("after the start: "),
                        "data_wait_s": statistics.median(x["data_wait_seconds"] for x in steady),
                        "fp32_masters": True,
                        "params": self.facts["params"],
                    }
            return {"error": process.why()}

    def other(self, contender: str) -> dict:
        """A process of contender.py, to its end."""
        spec = {
            **self.facts,
            "contender": contender,
            "config": self.train,
            "device": self.device.type,
            "quick": self.config["quick"],
            "steps": STEPS,
            "intervals": self.config["intervals"],
        }
        path = self.folder / f"{contender}.json"
        write(path, spec)
        command = [sys.executable, "-m", "llmtrain.bench.contender", str(path)]
        with self.started(contender, command) as process:
            first = None
            while process.alive():
                if first is None and any("first" in line for line in process.said()):
                    first = process.seconds()
            made = [line for line in process.said() if "step_seconds" in line]
        if process.status() != 0 or not made:
            return {"error": process.why()}
        found = made[0]
        return {
            "step_seconds": statistics.median(found["step_seconds"]),
            "peak_gib": found["peak_gib"],
            "first_step_s": first,
            "fp32_masters": found["fp32_masters"],
            "params": found["params"],
        }

    @contextmanager
    def started(self, contender: str, command: list[str]) -> Iterator[Process]:
        """The running command, which is killed at the end of the block."""
        caches = "ours" if contender == "bare" else contender
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **{name: str(self.folder / f"{caches}-{name}") for name in CACHES},
        }
        process = Process(command, environment, self.folder / contender, self.config["limit"])
        try:
            yield process
        finally:
            process.kill()
            if contender != "ours":  # whose caches the bare loop takes
                for name in CACHES:
                    shutil.rmtree(self.folder / f"{contender}-{name}", ignore_errors=True)


class Process:
    """A command with its output in files, killed with all that it started after `limit` seconds."""

    def __init__(self, command: list[str], environment: dict, stem: Path, limit: float):
        self.limit = limit
        self.out, self.err = (stem.with_name(f"{stem.name}.{end}") for end in ("out", "err"))
        self.began = time.monotonic()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def alive(self) -> bool:
        """Whether it runs, after a short wait."""
        time.sleep(POLL)
        return self.process.poll() is None and self.seconds() < self.limit

    def said(self) -> list[dict]:
        return json_lines(self.out)

    def told(self, phrase: str) -> str | None:
        """What follows a phrase in the first line of the output that has it."""
        for path in (self.out, self.err):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if phrase in line:
                    return line.partition(phrase)[2]
        return None

    def status(self) -> int | None:
        return self.process.poll()

    def why(self) -> str:
        """Why it gave no result: too slow, or its last words."""
        if self.process.poll() is None or self.seconds() >= self.limit:
            return f"no result within {self.limit:.0f} s"
        words = self.err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [word for word in words if "rror" in word] or words
        return told[-1][:300] if told else f"ended with code {self.process.returncode}"

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def lines(run_dir: Path, name: str) -> list[dict]:
    return json_lines(run_dir / f"{name}.jsonl")


def json_lines(path: Path) -> list[dict]:
    """The whole lines of a file that are JSON objects; none when there is no file."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole if line.startswith("{")]


def layer_costs(rows: list[dict], entries: dict[str, Entry]) -> None:
    """Milliseconds of a layer for one micro-batch, from two entries that differ in their layers."""
    by_name = {row["model"]: row for row in rows}
    for name, row in by_name.items():
        fewer = by_name.get(entries[name].layers_of or "")
        if fewer is None:
            continue
        layers = [int(entries[x].changes[-1].partition("=")[2]) for x in (name, fewer["model"])]

        def cost(find: Callable[[dict], dict], row=row, fewer=fewer, layers=layers) -> float | None:
            seconds = [find(x).get("step_seconds") for x in (row, fewer)]
            if None in seconds:
                return None
            return 1e3 * (seconds[0] - seconds[1]) / (layers[0] - layers[1]) / row["micro_steps"]

        costs = {"ours": cost(lambda x: x["ours"]), "bare": cost(lambda x: x.get("bare_loop", {}))}
        for peer in row["peers"]:
            costs[peer] = cost(lambda x, peer=peer: x["peers"].get(peer, {}))
        row["layer_ms"] = {name: value for name, value in costs.items() if value is not None}


def line(contender: str, found: dict) -> str:
    """One contender for the console."""
    if "error" in found:
        return f"  {contender:16}{found['error']}"
    mfu = f"{found['mfu']:6.1%}" if found["mfu"] is not None else "     -"
    first = f"first step {found['first_step_s']:5.1f} s" if found["first_step_s"] else ""
    masters = "fp32 weights" if found["fp32_masters"] else "bf16 weights"
    return (
        f"  {contender:16}{found['tokens_per_s']:12,.0f} tokens/s  MFU {mfu}  "
        f"{1e3 * found['step_seconds']:9.1f} ms  peak {found['peak_gib']:6.2f} GiB  "
        f"{first}  {masters}"
    )


def summary(row: dict) -> str:
    """Ours against the bare loop and the best peer."""
    ours, bare = row["ours"], row.get("bare_loop", {})
    if "tokens_per_s" not in ours:
        return ""
    parts = []
    if "tokens_per_s" in bare:
        parts.append(f"over the bare loop {bare['tokens_per_s'] / ours['tokens_per_s'] - 1:+.1%}")
        parts.append(f"its memory {ours['peak_gib'] / bare['peak_gib'] - 1:+.1%}")
    rates = {name: x["tokens_per_s"] for name, x in row["peers"].items() if "tokens_per_s" in x}
    if rates:
        best = max(rates, key=rates.get)
        parts.append(f"{ours['tokens_per_s'] / rates[best]:.2f}x the best peer ({best})")
    if layers := row.get("layer_ms"):
        parts.append("a layer " + ", ".join(f"{n} {ms:.2f} ms" for n, ms in layers.items()))
    return "  ours: " + "; ".join(parts) if parts else ""
