"""Loss curves of runs, laid over each other: training and held-out bits per byte against tokens.

python scripts/plot_runs.py runs/a/metrics.jsonl runs/b/metrics.jsonl --out curve.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Kind ("train", "val") -> (million tokens, bits per byte) of a metrics.jsonl."""
    curves: dict[str, list[tuple[float, float]]] = {"train": [], "val": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        curves[entry["kind"]].append((entry["tokens"] / 1e6, entry["bits_per_byte"]))
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", nargs="+", type=Path)
    parser.add_argument("--labels", nargs="+", help="one a file; default: its folder's name")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    labels = options.labels or [path.parent.name for path in options.metrics]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (path, label) in enumerate(zip(options.metrics, labels, strict=True)):
        curves = read(path)
        axes.plot(*zip(*curves["train"]), color=f"C{i}", alpha=0.6, label=f"{label}, training")
        axes.plot(*zip(*curves["val"]), color=f"C{i}", marker="o", label=f"{label}, held out")
    axes.set(xlabel="training tokens, millions", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
