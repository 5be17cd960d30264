"""Table, figure and judgement of the coordinate check and of the learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from .measure import PLACES, slope

# Slopes of log rms over log width that count as no growth. Below: means over fixed numbers of
# random directions shrink at small widths, as do logits of the first weights, by 1 / sqrt(width).
GROWS = 0.2
NAMES = {True: "muP", False: "standard"}


def slopes(rows: list[dict], arm: str, mup: bool, step: int) -> dict[str, float]:
    """Place -> slope of the change since step 0, means over seeds."""
    chosen = [r for r in rows if (r["arm"], r["mup"], r["step"]) == (arm, mup, step)]
    widths = sorted({r["width"] for r in chosen})
    found = {}
    for place in (f"{place}_change" for place in PLACES):
        if place in chosen[0]:
            means = [statistics.mean(r[place] for r in chosen if r["width"] == w) for w in widths]
            found[place.removesuffix("_change")] = slope(widths, means)
    return found


def losses(rows: list[dict], arm: str, mup: bool, step: int) -> str:
    chosen = [r for r in rows if (r["arm"], r["mup"], r["step"]) == (arm, mup, step)]
    widths = sorted({r["width"] for r in chosen})
    means = (statistics.mean(r["loss"] for r in chosen if r["width"] == w) for w in widths)
    return " ".join(f"{mean:.2f}" for mean in means)


def table(rows: list[dict]) -> str:
    """Markdown: a line for each arm and parametrisation."""
    last = max(r["step"] for r in rows)
    lines = [
        f"| model | parametrisation | {' | '.join(PLACES)} | loss by width |",
        "|---" * (len(PLACES) + 3) + "|",
    ]
    for arm in dict.fromkeys(r["arm"] for r in rows):
        for mup in (True, False):
            found = slopes(rows, arm, mup, last)
            cells = (f"{found[p]:+.2f}" if p in found else "" for p in PLACES)
            loss = losses(rows, arm, mup, last)
            lines.append(f"| {arm} | {NAMES[mup]} | {' | '.join(cells)} | {loss} |")
    return "\n".join(lines)


def growing(rows: list[dict]) -> list[str]:
    """What grows with the width though it is parametrised by muP, in words."""
    last = max(r["step"] for r in rows)
    return [
        f"{arm}: {place} grows by {value:+.2f}"
        for arm in dict.fromkeys(r["arm"] for r in rows)
        for place, value in slopes(rows, arm, True, last).items()
        if value > GROWS
    ]


def figure(rows: list[dict], file: Path) -> None:
    """Changes at the last step over the width: a row for each place, a line for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = max(r["step"] for r in rows)
    places = [p for p in PLACES if p != "hidden"]
    axes = plt.subplots(len(places), 2, figsize=(11, 10), sharex=True, sharey="row")[1]
    for column, mup in enumerate((False, True)):
        for axis, place in zip(axes[:, column], places, strict=True):
            for arm in dict.fromkeys(r["arm"] for r in rows):
                key = (arm, mup, last)
                chosen = [r for r in rows if (r["arm"], r["mup"], r["step"]) == key]
                if f"{place}_change" in chosen[0]:
                    axis.plot(*line(chosen, f"{place}_change"), marker="o", ms=3, label=arm)
            axis.set(xscale="log", yscale="log", title=f"{NAMES[mup]}: change of {place}")
            axis.set_xticks(widths := sorted({r["width"] for r in rows}), map(str, widths))
            axis.minorticks_off()
    axes[0, 1].legend(fontsize=6, bbox_to_anchor=(1.02, 1), loc="upper left")
    plt.savefig(file, dpi=90, bbox_inches="tight")
    plt.close()


def line(rows: Iterable[dict], key: str) -> tuple[list[int], list[float]]:
    """(widths, means relative to the first)."""
    rows = list(rows)
    widths = sorted({r["width"] for r in rows})
    means = [statistics.mean(r[key] for r in rows if r["width"] == w) for w in widths]
    return widths, [mean / means[0] for mean in means]


def rate_table(rows: list[dict]) -> str:
    """Markdown: losses of every learning rate; the best of a row is bold."""
    rates = sorted({r["lr"] for r in rows})
    lines = [
        f"| model | parametrisation | width | {' | '.join(f'{lr:.2g}' for lr in rates)} |",
        "|---" * (len(rates) + 3) + "|",
    ]
    keys = dict.fromkeys((r["arm"], r["mup"], r["width"]) for r in rows)
    for arm, mup, width in sorted(keys, key=lambda key: (key[0], not key[1], key[2])):
        found = {}
        for lr in rates:
            same = [r for r in rows if (r["arm"], r["mup"], r["width"]) == (arm, mup, width)]
            if tried := [r["loss"] for r in same if r["lr"] == lr]:
                found[lr] = statistics.mean(tried)
        best = min(found, key=found.get)
        shown = {lr: f"**{x:.3f}**" if lr == best else f"{x:.3f}" for lr, x in found.items()}
        cells = (shown.get(lr, "") for lr in rates)
        lines.append(f"| {arm} | {NAMES[mup]} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)
