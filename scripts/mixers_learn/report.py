"""Tables (Markdown), one figure and one JSON file of what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixers_learn import results
from mixers_learn.arms import ARMS

SOLVED = 0.99
NAMES = {"parity": "parity", "s3": "S3", "a5": "A5", "s5": "S5", "s5_swaps": "S5, swaps only"}


def score(row: dict) -> float:
    """What a learning rate is chosen by: mean accuracy over all tested sizes."""
    return sum(row["accuracy"].values()) / len(row["accuracy"])


def best(rows: list[dict]) -> dict[tuple[str, int, str], dict]:
    """(task, width, arm) -> the row of its best learning rate, the seeds' accuracies averaged."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["width"], row["arm"], row["lr"]), []).append(row)
    chosen: dict[tuple[str, int, str], dict] = {}
    for (task, width, arm, _), members in groups.items():
        names = members[0]["accuracy"]
        mean = {n: sum(m["accuracy"][n] for m in members) / len(members) for n in names}
        row = {**members[0], "accuracy": mean, "seeds": len(members)}
        row["finished"] = all(member["finished"] for member in members)
        at = (task, width, arm)
        if at not in chosen or score(row) > score(chosen[at]):
            chosen[at] = row
    return chosen


def in_order(names: list[str]) -> list[str]:
    return [name for name in ARMS if name in names]


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracy_table(chosen: dict[tuple, dict], task: str, width: int) -> str:
    """An arm a line: accuracy by size, the rate it was reached with, the arm's sizes."""
    rows = {a: row for (t, w, a), row in chosen.items() if (t, w) == (task, width)}
    names = next(iter(rows.values()))["accuracy"]
    head = ["arm", *names, "best lr", "parameters", "state, bytes", "FLOPs/token"]
    lines = []
    for arm in in_order(list(rows)):
        row = rows[arm]
        mark = "" if row["finished"] else " (stopped early)"
        cells = [f"{value:.3f}" for value in row["accuracy"].values()]
        facts = [f"{row['lr']:g}", f"{row['body_parameters']:,}", f"{row['state_bytes']:,}"]
        lines.append([ARMS[arm].label + mark, *cells, *facts, f"{row['flops_per_token']:,.0f}"])
    return table(head, lines)


def books_table(rows: list[dict]) -> str:
    head = ["arm", "held-out bits/byte", "lr", "at other rates", "tokens", "tokens/s"]
    head += ["parameters", "total", "state, bytes", "FLOPs/token"]
    lines = []
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]):
        counts = [f"{row[k]:,}" for k in ("body_parameters", "parameters", "state_bytes")]
        rate = f"{row['tokens_per_second']:,.0f}"
        others = [f"{loss:.4f}" for lr, loss in row["rates"].items() if float(lr) != row["lr"]]
        cells = [f"{row['bits_per_byte']:.4f}", f"{row['lr']:g}", ", ".join(others)]
        cells += [f"{row['tokens']:,}", rate]
        cells += counts
        lines.append([ARMS[row["arm"]].label, *cells, f"{row['flops_per_token']:,.0f}"])
    return table(head, lines)


def markdown(rows: list[dict]) -> str:
    """All tables. Parameters: outside embedding and head, of which a token uses all; for a mixture
    of experts, those that it uses."""
    parts = []
    synthetic = [row for row in rows if row["part"] != "books"]
    chosen = best(synthetic)
    for task, width in dict.fromkeys((task, width) for task, width, _ in chosen):
        recall = task == "recall"
        what = "tokens:pairs" if recall else "length, scored over its second half"
        title = "Recall" if recall else f"State tracking, {NAMES[task]}"
        parts += [f"### {title}, width {width}", f"Accuracy by {what}."]
        parts.append(accuracy_table(chosen, task, width))
    book_rows = [row for row in rows if row["part"] == "books"]
    if book_rows:
        parts += ["### Books", books_table(book_rows)]
    return "\n\n".join(parts) + "\n"


def draw_accuracy(axes: Axes, chosen: dict[tuple, dict], task: str, width: int) -> None:
    arms = list(ARMS)
    for (t, w, arm), row in chosen.items():
        if (t, w) != (task, width):
            continue
        points: dict[int, list[float]] = {}
        for name, value in row["accuracy"].items():
            points.setdefault(int(name.split(":")[-1]), []).append(value)
        means = [sum(values) / len(values) for values in points.values()]
        index = arms.index(arm)
        axes.plot(list(points), means, color=f"C{index}", marker="os^Dv"[index % 5], ms=4)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    recall = task == "recall"
    axes.set_title(f"recall, width {width}" if recall else f"{NAMES[task]}, width {width}", size=9)
    axes.set_xlabel("key-value pairs" if recall else "length, tokens")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)


def draw_books(axes: Axes, rows: list[dict]) -> None:
    arms = list(ARMS)
    for row in rows:
        index = arms.index(row["arm"])
        x, y = zip(*row["val"])
        style = {"color": f"C{index}", "marker": "os^Dv"[index % 5], "ms": 4}
        axes.plot([tokens / 1e6 for tokens in x], y, **style)
    axes.set_title("books", size=9)
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)


def figure(rows: list[dict], path: Path) -> None:
    """A panel for each task and width, and one for the books."""
    chosen = best([row for row in rows if row["part"] != "books"])
    panels = list(dict.fromkeys((task, width) for task, width, _ in chosen))
    book_rows = [row for row in rows if row["part"] == "books"]
    count = len(panels) + bool(book_rows)
    columns = min(3, count)
    lines = -(-count // columns)
    sheet = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(sheet)
    grid = sheet.subplots(lines, columns, squeeze=False).flatten()
    for axes, (task, width) in zip(grid, panels):
        draw_accuracy(axes, chosen, task, width)
    if book_rows:
        draw_books(grid[len(panels)], book_rows)
    for axes in grid[count:]:
        axes.set_axis_off()
    seen = in_order(list({row["arm"] for row in rows}))
    arms = list(ARMS)
    handles = [
        grid[0].plot([], [], color=f"C{arms.index(a)}", marker="os^Dv"[arms.index(a) % 5])[0]
        for a in seen
    ]
    labels = [ARMS[arm].label for arm in seen]
    sheet.legend(handles, labels, loc="outside lower center", ncols=min(4, len(seen)), fontsize=8)
    sheet.savefig(path, dpi=120)


def write(out: Path) -> None:
    """tables.md, mixers.png and mixers.json in the folder. ValueError without rows."""
    rows = results.read(out)
    if not rows:
        raise ValueError(
            f"report: {out / results.FILE} has no rows, expected some; run a part before"
        )
    (out / "tables.md").write_text(markdown(rows), encoding="utf-8")
    (out / "mixers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    figure(rows, out / "mixers.png")
    print(markdown(rows))
