"""Does model.mup_base_width keep inner vectors and learning rates independent of the width?

    python scripts/coord_check.py check --out results/coord_check    # every mixer, a few steps
    python scripts/coord_check.py rates --out results/coord_check    # best rates over the widths
    python scripts/coord_check.py report --out results/coord_check

check: rms of what a few steps change, in muP and in the standard parametrisation (first weights
1 / sqrt(fan in), one learning rate); the slope of its logarithm over that of the width is to be
about 0 (Yang et al. 2022, arXiv:2203.03466, appendix D.1). rates: the loss after --rate-steps.
Rows are appended to <out>/check.jsonl and rates.jsonl; a second start makes only what is missing.
Exits with 1 when something grows in muP. Arms: scripts/coord_check/arms.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from coord_check import measure, report
from coord_check.arms import ARMS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="+", choices=("check", "rates", "report"))
    add("--out", type=Path, required=True, help="folder of rows, table and figure")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=4)
    add("--lr", type=float, default=1e-2)
    add("--rate-arms", nargs="+", choices=ARMS, default=["attention", "mamba2"])
    add("--rate-widths", nargs="+", type=int, default=[64, 128, 256])
    add("--rates", nargs="+", type=float, default=[2.0**-k for k in range(10, 2, -1)])
    add("--rate-steps", type=int, default=60)
    add("--rate-seeds", nargs="+", type=int, default=[0, 1])
    return parser.parse_args(arguments)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, rows: list[dict]) -> None:
    with file.open("a") as out:
        for row in rows:
            measured = {k: x for k, x in row.items() if type(x) is float and k != "lr"}
            short = {k: float(f"{x:.4g}") for k, x in measured.items()}
            out.write(json.dumps(row | short) + "\n")


def check(options: argparse.Namespace, file: Path) -> None:
    done = {(r["arm"], r["mup"], r["width"], r["seed"]) for r in read(file)}
    for arm in options.arms:
        for mup in (True, False):
            for width in options.widths:
                for seed in options.seeds:
                    if (arm, mup, width, seed) in done:
                        continue
                    key = {"arm": arm, "mup": mup, "width": width, "seed": seed}
                    rows = measure.course(**key, steps=options.steps, lr=options.lr)
                    append(file, [{**key, "step": i, **row} for i, row in enumerate(rows)])
        print(f"check: {arm} done", flush=True)


def rates(options: argparse.Namespace, file: Path) -> None:
    done = {(r["arm"], r["mup"], r["width"], r["seed"], r["lr"]) for r in read(file)}
    for arm in options.rate_arms:
        for width in options.rate_widths:
            for mup in (True, False):
                for seed in options.rate_seeds:
                    for lr in options.rates:
                        if (arm, mup, width, seed, lr) in done:
                            continue
                        key = {"arm": arm, "mup": mup, "width": width, "seed": seed}
                        losses = measure.losses(**key, steps=options.rate_steps, lr=lr)
                        tail = losses[-options.rate_steps // 6 :]
                        append(file, [{**key, "lr": lr, "loss": statistics.mean(tail)}])
            print(f"rates: {arm} at width {width} done", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    checked, rated = options.out / "check.jsonl", options.out / "rates.jsonl"
    if "check" in options.parts:
        check(options, checked)
    if "rates" in options.parts:
        rates(options, rated)
    failures: list[str] = []
    if "report" in options.parts:
        text = []
        if rows := read(checked):
            text.append(report.table(rows))
            report.figure(rows, options.out / "check.png")
            failures = report.growing(rows)
        if rows := read(rated):
            text.append(report.rate_table(rows))
        (options.out / "tables.md").write_text("\n\n".join(text) + "\n")
        print("\n\n".join(text))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
