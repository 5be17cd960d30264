"""Tables of the results, and all rows in one JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from soak import results
from soak.breakage import KINDS

Rows = list[dict]


def table(head: list[str], lines: Iterable[list[object]]) -> str:
    rows = [head, ["---"] * len(head), *([str(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def yes(value: bool) -> str:
    return "yes" if value else "**no**"


def cell_line(row: dict) -> list[object]:
    cell, kills = row["cell"], row["kills"]
    landed = Counter(kill["landed"].partition(":")[0] for kill in kills)
    axes = [cell["channel"], cell["stack"], cell["objective"], cell["optimizer"], cell["save"]]
    return [
        cell["mixer"],
        cell["stage"],
        f"{cell['ranks']} x {cell['micro_steps']}",
        ", ".join([*axes, *(["validation"] if cell["validation"] else [])]),
        len(kills),
        ", ".join(f"{count} {moment}" for moment, count in sorted(landed.items())),
        row["restarts"],
        row["repeated"],
        f"{row['seconds']:.0f}",
        yes(row["equal"]),
    ]


def cells_table(rows: Rows) -> str:
    """A cell a line."""
    head = ["mixer", "ZeRO", "ranks x micro-steps", "the rest", "kills", "where they hit"]
    head += ["restarts", "steps repeated", "seconds", "equal"]
    order = sorted(rows, key=lambda row: (row["cell"]["mixer"], row["cell"]["stage"]))
    return table(head, map(cell_line, order))


def moments_table(rows: Rows) -> str:
    """How many kills hit which moment, at which stage."""
    stages = sorted({row["cell"]["stage"] for row in rows})
    counts = Counter((k["landed"], row["cell"]["stage"]) for row in rows for k in row["kills"])
    moments = sorted({moment for moment, _ in counts})
    lines = []
    for moment in moments:
        line = [counts[moment, stage] for stage in stages]
        lines.append([moment, *line, sum(line)])
    totals = [sum(counts[moment, stage] for moment in moments) for stage in stages]
    lines.append(["all", *totals, sum(totals)])
    return table(["where the kill hit", *(f"ZeRO {stage}" for stage in stages), "all"], lines)


def survivors_table(rows: Rows) -> str:
    """How long ranks outlived a killed one, by moment."""
    ends: dict[str, list[dict]] = {}
    for row in rows:
        for kill in row["kills"]:
            moment = kill["landed"].partition(":")[0]
            ends.setdefault(moment, []).extend(kill["survivors"].values())
    lines = []
    for moment, found in sorted(ends.items()):
        alone = sorted(end["seconds"] for end in found if end["code"] is not None)
        times = [f"{median(alone):.2f}", f"{alone[-1]:.2f}"] if alone else ["-", "-"]
        codes = Counter(end["code"] for end in found if end["code"] is not None)
        shown = ", ".join(f"{code}: {n}" for code, n in sorted(codes.items())) or "-"
        if found:
            lines.append([moment, len(found), *times, shown, len(found) - len(alone)])
    head = ["where the kill hit", "survivors", "median s", "longest s", "exit codes", "had to be"]
    head[-1] += " killed"
    return table(head, lines)


def damage_table(rows: Rows) -> str:
    """File by kind of damage: whether it was named and refused, and the run ended as its twin."""
    kinds = [*KINDS, "swapped between ranks", "swapped between steps", "bits flipped one by one"]
    files = list(dict.fromkeys(row["file"] for row in rows if row["kind"] in kinds))
    lines = []
    for file in files:
        line = [f"`{file}`" if "." in file or file == "latest" else file]
        for kind in kinds:
            found = [row for row in rows if (row["file"], row["kind"]) == (file, kind)]
            good = sum(row["equal"] for row in found)
            text = f"{good}/{len(found)}" if found else "-"
            if kind == "bits flipped one by one" and found:
                refused, count = (sum(row[key] for row in found) for key in ("refused", "count"))
                text = f"{refused}/{count}"
            line.append(text if good == len(found) else f"**{text}**")
        lines.append(line)
    return table(["file", *kinds], lines)


def other_damage(rows: Rows) -> str:
    listed = {*KINDS, "swapped between ranks", "swapped between steps", "bits flipped one by one"}
    lines = [
        [
            row["name"],
            row["stage"],
            row.get("ended", "-"),
            row.get("said", "")[:160],
            yes(row["equal"]),
        ]
        for row in rows
        if row["kind"] not in listed
    ]
    return table(["damage", "ZeRO", "ended", "said", "as its twin"], lines)


def problems(rows: Rows) -> list[str]:
    return [f"- {row['name']}: {text}" for row in rows for text in row["problems"]]


def kill_part(rows: Rows) -> list[str]:
    kills = sum(len(row["kills"]) for row in rows)
    equal = sum(row["equal"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    text = (
        f"{kills} kills in {len(rows)} cells, {equal} of which ended equal to their undisturbed "
        f"twins; {sum(row['repeated'] for row in rows)} steps were repeated; "
        f"{seconds / 60:.0f} minutes of cells. Code: {commits(rows)}."
    )
    parts = ["## Kills", text, "### Where they hit", moments_table(rows)]
    parts += ["### How long other ranks lived on", survivors_table(rows)]
    return [*parts, "### Cells", cells_table(rows)]


def damage_part(rows: Rows) -> list[str]:
    equal = sum(row["equal"] for row in rows)
    text = f"{len(rows)} cases, {equal} as they must be. Code: {commits(rows)}."
    parts = ["## Damage", text, damage_table(rows)]
    return [*parts, "### Whole folders and full disks", other_damage(rows)]


def resume_part(rows: Rows) -> list[str]:
    """Chains that were stopped and continued."""
    same = [row for row in rows if "differences" not in row]
    moved = [row for row in rows if "differences" in row]
    equal = sum(row["equal"] for row in rows)
    text = (
        f"{len(rows)} trainings, {equal} of which ended as their undisturbed twins: {len(same)} "
        f"continued as they were, bit for bit, {len(moved)} through other ranks or stages, beside "
        f"one rank. Code: {commits(rows)}."
    )
    return ["## Stopped and continued", text, chains_table([*same, *moved])]


def chains_table(rows: Rows) -> str:
    """A chain a line, with the largest relative differences from the twin where it moved."""
    lines = []
    for row in rows:
        first, found = row["legs"][0], row.get("differences", {})
        legs = ", ".join(f"{leg['ranks']} x {leg['micro_steps']}" for leg in row["legs"])
        stages = dict.fromkeys(str(leg["stage"]) for leg in row["legs"])
        rest = ", ".join(first[name] for name in ("channel", "stack", "objective", "optimizer"))
        line = [first["mixer"], ", ".join(stages), legs, rest]
        line += [f"{found[name]:.0e}" if name in found else "0" for name in ("loss", "weights")]
        lines.append([*line, f"{row['seconds']:.0f}", yes(row["equal"])])
    head = ["mixer", "ZeRO", "ranks x micro-steps of each leg", "the rest", "loss differs"]
    return table([*head, "weights differ", "seconds", "as it must be"], lines)


def commits(rows: Rows) -> str:
    return ", ".join(sorted({row["commit"] for row in rows}))


def write(out: Path) -> bool:
    """tables.md and soak.json; whether everything in them is as it must be."""
    makers = {"kill": kill_part, "damage": damage_part, "resume": resume_part}
    content = {part: results.read(out, part) for part in makers}
    if not any(content.values()):
        raise SystemExit(
            f"report: {out} has no rows, expected some; run kill, damage or resume before"
        )
    parts, wrong = [], []
    for part, rows in content.items():
        parts += makers[part](rows) if rows else []
        wrong += problems(rows)
    if wrong:
        parts += ["## Problems", "\n".join(wrong)]
    (out / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (out / "soak.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print("\n\n".join(parts))
    return not wrong
