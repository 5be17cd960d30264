"""What saving costs a training, and a run that goes on with fewer ranks.

    python scripts/durability.py stall  --out OUT [--ranks 1] -- experiment=books_124m ...
    python scripts/durability.py resize --out OUT --ranks 2 1 -- experiment=books_124m ...

Behind the dashes stand overrides of `llmtrain train`.

stall: the run twice, with train.async_save=true and false; seconds that training waited at a save
beside the seconds of a step, and the rate at which files became durable. The save after the last
step stands apart: the program waits there for the disk, and no step waits with it.
resize: the run twice, undisturbed on ranks[0], and stopped by SIGTERM after --stop-at of its steps
and continued on ranks[1], ranks[2] ... in turn.
Every step's loss of both courses, their largest difference and the samples they read, which must be
equal; resize.png lays the curves over each other. Ends with code 1 when a sample differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llmtrain.exits import FINISHED, STOPPED

PATIENCE = 1800.0  # seconds, of a start that compiles


def parse(arguments: list[str]) -> argparse.Namespace:
    """overrides: what stands behind the dashes, which argparse would lose behind options."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("stall", "resize"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--stop-at", type=float, nargs="+", default=[0.5], help="shares of a run")
    options = parser.parse_args(arguments[:cut])
    options.overrides = arguments[cut + 1 :]
    return options


def ranked(command: list[str], ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else []), *command]


def start(ranks: int, overrides: list[str], log: Path) -> subprocess.Popen:
    """`llmtrain train` on so many ranks, in a process group of its own; output into log."""
    command = ranked(["-m", "llmtrain.cli", "train", *overrides], ranks)
    print("+", *command[1:], flush=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, expected: tuple[int, ...], log: Path) -> None:
    """Wait for the end; RuntimeError for another exit code."""
    code = process.wait()
    if code not in expected:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"llmtrain train ended with {code}, expected {expected}:\n{tail}")


def lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    return [json.loads(line) for line in whole]


def steps(run_dir: Path) -> dict[int, dict]:
    """Step -> its last line in the ledger."""
    return {line["step"]: line for line in lines(run_dir / "ledger.jsonl") if "loss" in line}


def stop_after(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """SIGTERM to every rank once that step is in the ledger."""
    began = time.monotonic()
    while max(steps(run_dir), default=0) < step:
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            raise RuntimeError(f"{run_dir}: step {step} was not reached; see its log")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)


def stall(options: argparse.Namespace) -> int:
    rows = []
    for background in (True, False):
        run_dir = options.out / f"stall_async_{str(background).lower()}"
        log = options.out / f"{run_dir.name}.log"
        own = [f"run_dir={run_dir}", f"train.async_save={str(background).lower()}"]
        finish(start(options.ranks[0], [*options.overrides, *own], log), (FINISHED,), log)
        row = stall_row(lines(run_dir / "metrics.jsonl"), max(steps(run_dir)))
        rows.append({"async_save": background, "ranks": options.ranks[0], **row})
        print(json.dumps(rows[-1]), flush=True)
    (options.out / "stall.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def stall_row(metrics: list[dict], last_step: int) -> dict:
    """What the lines of a finished run say of its saves in training, and of its end."""
    saves = [line for line in metrics if line["kind"] == "save"]
    waits = [save["stall_seconds"] for save in saves if save["step"] < last_step]
    if not waits:
        raise SystemExit("durability: no save before the last step; lower train.save_every")
    step = statistics.median(line["step_seconds"] for line in metrics if "step_seconds" in line)
    at_end = sum(save["stall_seconds"] for save in saves if save["step"] == last_step)
    return {
        "saves_in_training": len(waits),
        "step_seconds": step,
        "stall_seconds": statistics.median(waits),
        "largest_stall_seconds": max(waits),
        "stall/step": statistics.median(waits) / step,
        "end_seconds": at_end + sum(save["end_wait_seconds"] for save in saves),
        "gib": saves[0]["bytes"] / 2**30,
        "durable_gib_per_second": statistics.median(
            save["bytes_per_second"] / 2**30 for save in saves
        ),
    }


def resize(options: argparse.Namespace) -> int:
    if len(options.stop_at) != len(options.ranks) - 1:
        raise SystemExit("durability: expected one --stop-at less than --ranks; give as many")
    plain, changed = options.out / "undisturbed", options.out / "resized"
    log = options.out / "undisturbed.log"
    overrides = [*options.overrides, f"run_dir={plain}"]
    finish(start(options.ranks[0], overrides, log), (FINISHED,), log)
    truth = steps(plain)
    total, stops = max(truth), []
    log = options.out / "resized.log"
    for i, ranks in enumerate(options.ranks):
        process = start(ranks, [*options.overrides, f"run_dir={changed}"], log)
        last = i == len(options.ranks) - 1
        if not last:
            stop_after(process, changed, round(options.stop_at[i] * total))
        # torchrun has an exit code of its own for ranks that ended with one other than 0
        finish(process, (FINISHED,) if last else (STOPPED, 1), log)
        if not last:
            stops.append(max(steps(changed)))
    found = steps(changed)
    same = sorted(found) == sorted(truth) and all(
        found[step]["samples"] == truth[step]["samples"] for step in truth
    )
    gaps = {step: abs(found[step]["loss"] - truth[step]["loss"]) for step in truth if step in found}
    before = [gap for step, gap in gaps.items() if step <= stops[0]]
    after = [gap for step, gap in gaps.items() if step > stops[0]]
    summary = {
        "ranks": options.ranks,
        "steps": total,
        "continued_after_steps": stops,
        "same_samples": same,
        "largest_difference_before": max(before),
        "largest_difference_after": max(after),
        "final_loss": [truth[total]["loss"], found[total]["loss"]],
        "undisturbed": [[s, truth[s]["loss"]] for s in sorted(truth)],
        "resized": [[s, found[s]["loss"]] for s in sorted(found)],
    }
    (options.out / "resize.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    draw(options.out / "resize.png", summary)
    print(json.dumps({k: v for k, v in summary.items() if not isinstance(v, list) or len(v) < 9}))
    return 0 if same else 1


def draw(path: Path, summary: dict) -> None:
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ranks = summary["ranks"]
    upper.plot(*zip(*summary["undisturbed"]), lw=3, alpha=0.4, label=f"{ranks[0]} ranks throughout")
    upper.plot(*zip(*summary["resized"]), lw=1, label=f"on {', then '.join(map(str, ranks))} ranks")
    gaps = [
        (step, abs(loss - other) or float("nan"))
        for (step, loss), (_, other) in zip(summary["undisturbed"], summary["resized"])
    ]
    lower.semilogy(*zip(*gaps), ".", ms=3)
    for axes in (upper, lower):
        for step in summary["continued_after_steps"]:
            axes.axvline(step + 0.5, color="gray", ls=":")
        axes.grid(alpha=0.3)
    upper.set(ylabel="loss, nats per token")
    lower.set(xlabel="step", ylabel="difference")
    upper.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    return {"stall": stall, "resize": resize}[options.part](options)


if __name__ == "__main__":
    sys.exit(main())
