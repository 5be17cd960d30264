"""Loss curves of runs, laid over each other: training and held-out bits per byte against tokens.

    python scripts/plot_runs.py runs/a/metrics.jsonl runs/b/metrics.jsonl --out curve.png

Prints the training curves' means over ten stretches of tokens too, and how far each is from the
first: runs on the same data in the same order, as precisions or kernels are compared, differ there
by less than a curve's own noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

Curve = list[tuple[float, float]]  # million tokens, bits per byte
STRETCHES = 10


def read(path: Path) -> dict[str, Curve]:
    """Kind ("train", "val") -> curve of a metrics.jsonl. What a rollback made again counts as it
    was made last; lines without text, as of random tokens, have no bits per byte."""
    found: dict[str, dict[float, float]] = {"train": {}, "val": {}}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] in found and entry["bits_per_byte"] is not None:
            found[entry["kind"]][entry["tokens"] / 1e6] = entry["bits_per_byte"]
    return {kind: sorted(curve.items()) for kind, curve in found.items()}


def table(curves: dict[str, Curve]) -> Iterator[str]:
    """Lines of a Markdown table. curves: label -> training curve. ValueError where they share no
    tokens."""
    first, *others = curves
    shared = sorted(set.intersection(*({tokens for tokens, _ in c} for c in curves.values())))
    if not shared:
        raise ValueError(
            "plot_runs: got curves without a number of tokens in common, expected runs logged at "
            "the same steps; set the same train.log_every and train.global_batch_tokens"
        )
    titles = ["million tokens", *curves, *(f"{other} - {first}" for other in others)]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    size = -(-len(shared) // STRETCHES)
    for start in range(0, len(shared), size):
        stretch = set(shared[start : start + size])
        means = {
            label: fmean(value for tokens, value in curve if tokens in stretch)
            for label, curve in curves.items()
        }
        gaps = [f"{means[other] - means[first]:+.4f}" for other in others]
        cells = [f"{value:.4f}" for value in means.values()] + gaps
        yield f"| {min(stretch):.2f} to {max(stretch):.2f} | {' | '.join(cells)} |"


def plot(curves: dict[str, dict[str, Curve]], out: Path) -> None:
    """curves: label -> what read() gives."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (label, run) in enumerate(curves.items()):
        for kind, name, style in (
            ("train", "training", {"alpha": 0.6}),
            ("val", "held out", {"marker": "o"}),
        ):
            if run[kind]:
                axes.plot(*zip(*run[kind]), color=f"C{i}", label=f"{label}, {name}", **style)
    axes.set(xlabel="training tokens, millions", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", nargs="+", type=Path)
    parser.add_argument("--labels", nargs="+", help="one a file; default: its folder's name")
    parser.add_argument("--out", type=Path, help="PNG; needs matplotlib")
    options = parser.parse_args()
    labels = options.labels or [path.parent.name for path in options.metrics]
    runs = dict(zip(labels, map(read, options.metrics), strict=True))
    if len(runs) < len(options.metrics):
        parser.error(f"labels: got {labels}, expected different ones; give --labels")
    if len(runs) > 1:
        print("\n".join(table({label: run["train"] for label, run in runs.items()})))
    if options.out:
        plot(runs, options.out)


if __name__ == "__main__":
    main()
