"""Which nodes are bad, from what their ranks found; pure, without torch."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass

# Before each report, among whatever else a rank prints.
MARK = "LLMTRAIN-PREFLIGHT "
# Where the limit in launch.yaml is null.
GPU_GEMM_SHARE, GPU_EXCHANGE_SHARE = 0.8, 0.3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """bad: node -> reasons. failures: what keeps the ranks from training though no node can be
    blamed. doubts: what should be looked at. nodes: node -> figures."""

    bad: dict[str, list[str]]
    failures: list[str]
    doubts: list[str]
    nodes: dict[str, dict]

    @property
    def good(self) -> bool:
        return not self.bad and not self.failures

    def to_json(self) -> dict:
        return asdict(self)

    def table(self) -> str:
        """A line a node, then what is wrong."""
        titles = ("node", "ranks", "gemm TFLOP/s", "all-reduce GB/s", "exchange GB/s")
        titles += ("clock s", "disk MiB/s", "free GiB", "verdict")
        rows = [titles]
        for node, facts in self.nodes.items():
            keys = ("gemm_tflops", "all_reduce_gbps", "exchange_gbps", "clock_seconds")
            keys += ("mib_per_second", "free_gib")
            figures = [shown(facts.get(key)) for key in keys]
            rows.append((node, str(facts["ranks"]), *figures, "BAD" if node in self.bad else "ok"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows]
        for node, reasons in self.bad.items():
            lines += [f"bad node {node}: {reason}" for reason in reasons]
        lines += [f"failure: {failure}" for failure in self.failures]
        return "\n".join(lines + [f"warning: {doubt}" for doubt in self.doubts])


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def read_reports(lines: list[str]) -> list[dict]:
    """The last report of each rank, among other output."""
    reports: dict[int, dict] = {}
    for line in lines:
        _, mark, text = line.partition(MARK)
        if not mark:
            continue
        try:
            report = json.loads(text)
        except json.JSONDecodeError:  # cut off as its node died
            continue
        reports[report["rank"]] = report
    return [reports[rank] for rank in sorted(reports)]


def wishes(preflight: dict, *, gpus: int, nodes: int, run_dir: str, code: str | None) -> dict:
    """What probes.py and verdict.py want to know. code: a folder whose files are compared."""
    return {**preflight, "gpus": gpus, "nodes": nodes, "run_dir": run_dir, "code": code}


def judge(reports: list[dict], nodes: list[str], ranks_per_node: int, wanted: dict) -> Verdict:
    """wanted: the preflight section of launch.yaml, and gpus: GPUs a node."""
    bad: dict[str, list[str]] = {node: [] for node in nodes}
    of_node = {node: [r for r in reports if r["node"] == node] for node in nodes}
    for node, found in of_node.items():
        bad[node] += own_faults(found, ranks_per_node, wanted)
    blame_absent(reports, nodes, ranks_per_node, bad)
    compare_versions(of_node, bad)
    compare_clocks(of_node, wanted["clock_seconds"], bad)
    share = wanted["gemm_share"] or (GPU_GEMM_SHARE if wanted["gpus"] else None)
    compare_gemm(reports, share, bad)
    share = wanted["all_reduce_share"] or (GPU_EXCHANGE_SHARE if wanted["gpus"] else None)
    doubts = compare_exchange(of_node, share, bad)
    guilty = {node: reasons for node, reasons in bad.items() if reasons}
    return Verdict(
        bad=guilty,
        failures=[] if guilty else group_failures(reports),
        doubts=doubts,
        nodes={node: figures(found) for node, found in of_node.items()},
    )


def group_failures(reports: list[dict]) -> list[str]:
    """What went wrong between the ranks, when every one of them is well alone."""
    failures = {f"{report['group_error']}": None for report in reports if "group_error" in report}
    if any(not report.get("sum_right", True) for report in reports):
        failures["the sum over all ranks (all-reduce) is wrong"] = None
    hung = [str(report["rank"]) for report in reports if "done" not in report]
    if hung:
        failures[f"ranks {', '.join(hung)} did not end their exchange with the others"] = None
    return list(failures)


def blame_absent(
    reports: list[dict], nodes: list[str], ranks_per_node: int, bad: dict[str, list[str]]
) -> None:
    """Nodes that rank 0 waited for in vain, though they answered; rank 0's, when it was all."""
    ranks = {rank for report in reports for rank in report.get("missing", ())}
    absent = sorted({nodes[rank // ranks_per_node] for rank in ranks} - {nodes[0]})
    if len(absent) == len(nodes) - 1 > 1:
        bad[nodes[0]].append("no other node reaches it")
        return
    for node in absent:
        bad[node].append(f"does not reach {nodes[0]}")


def own_faults(found: list[dict], ranks_per_node: int, wanted: dict) -> list[str]:
    """What is wrong with a node, seen alone."""
    reasons = []
    if len(found) < ranks_per_node:
        answered = f"{len(found)} of {ranks_per_node} ranks answered"
        reasons.append(f"{answered} within {wanted['timeout_seconds']} s")
    reasons += dict.fromkeys(report["error"] for report in found if "error" in report)
    for report in found:
        reasons += report.get("gpu_errors", [])
        if report.get("gpus", wanted["gpus"]) < wanted["gpus"]:
            reasons.append(f"{report['gpus']} GPUs, expected {wanted['gpus']}")
        if "disk" not in report:
            continue
        disk = report["disk"]
        if disk["free_gib"] < wanted["disk_gib"]:
            least = f"preflight.disk_gib={wanted['disk_gib']:g}"
            reasons.append(f"{disk['free_gib']:.1f} GiB free in run_dir, expected {least}")
        if disk["mib_per_second"] < wanted["disk_mib_per_second"]:
            least = f"preflight.disk_mib_per_second={wanted['disk_mib_per_second']}"
            reasons.append(f"run_dir takes {disk['mib_per_second']:.1f} MiB/s, expected {least}")
    return reasons


def compare_versions(of_node: dict[str, list[dict]], bad: dict[str, list[str]]) -> None:
    """Nodes with other software or GPUs than most have (than the first node, where two differ)."""
    have: dict[str, list[tuple[str, str]]] = {}
    for node, found in of_node.items():
        for report in found:
            gpu = {"gpu": report["gpu"]} if "gpu" in report else {}
            for key, value in {**report.get("versions", {}), **gpu}.items():
                have.setdefault(key, []).append((node, value))
    for key, values in sorted(have.items()):
        usual, _ = Counter(value for _, value in values).most_common(1)[0]
        for node, value in dict.fromkeys(values):
            if value != usual:
                bad[node].append(f"{key} {value}, where most nodes have {usual}")


def compare_clocks(of_node: dict[str, list[dict]], limit: float, bad: dict[str, list[str]]) -> None:
    """Nodes whose clock is far from the median."""
    ahead = {
        node: statistics.median(values)
        for node, found in of_node.items()
        if (values := [r["clock_seconds"] for r in found if "clock_seconds" in r])
    }
    middle = statistics.median_low(ahead.values()) if ahead else 0.0
    for node, value in ahead.items():
        if abs(value - middle) > limit:
            bad[node].append(
                f"clock {value - middle:+.1f} s from the others', expected "
                f"preflight.clock_seconds={limit}"
            )


def compare_gemm(reports: list[dict], share: float | None, bad: dict[str, list[str]]) -> None:
    """Ranks that multiply matrices more slowly than a share of the median."""
    rates = [report["gemm_tflops"] for report in reports if "gemm_tflops" in report]
    if share is None or not rates:
        return
    middle = statistics.median(rates)
    for report in reports:
        rate = report.get("gemm_tflops", middle)
        if rate < share * middle and report["node"] in bad:
            bad[report["node"]].append(
                f"rank {report['rank']} multiplies matrices at {rate:.3g} TFLOP/s, the median is "
                f"{middle:.3g}, expected preflight.gemm_share={share}"
            )


def compare_exchange(
    of_node: dict[str, list[dict]], share: float | None, bad: dict[str, list[str]]
) -> list[str]:
    """Nodes that are slow to both neighbours of the ring; returns the slow links that do not tell
    which end is to blame."""
    rates = {
        node: min(values)
        for node, found in of_node.items()
        if (values := [r["exchange_gbps"] for r in found if "exchange_gbps" in r])
    }
    names = list(of_node)
    if share is None or len(rates) < len(names) or len(names) < 2:
        return []
    middle = statistics.median(rates.values())
    slow = {node for node, rate in rates.items() if rate < share * middle}  # the link into it
    following = dict(zip(names, [*names[1:], names[0]]))
    guilty = {node for node in slow if following[node] in slow and len(names) > 2}
    for node in guilty:
        bad[node].append(
            f"exchanges {rates[node]:.3g} GB/s with its neighbours, the median is {middle:.3g}, "
            f"expected preflight.all_reduce_share={share}"
        )
    explained = guilty | {following[node] for node in guilty}
    return [
        f"the link into {node} is slow: {rates[node]:.3g} GB/s, the median is {middle:.3g}"
        for node in sorted(slow - explained)
    ]


def figures(found: list[dict]) -> dict:
    """A node's numbers: the worst of its ranks."""
    values: dict = {"ranks": len(found)}
    for key in ("gemm_tflops", "all_reduce_gbps", "exchange_gbps"):
        known = [report[key] for report in found if key in report]
        if known:
            values[key] = min(known)
    clocks = [report["clock_seconds"] for report in found if "clock_seconds" in report]
    if clocks:
        values["clock_seconds"] = max(clocks, key=abs)
    for report in found:
        values |= report.get("disk", {})
        if "versions" in report:
            values["versions"] = values.get("versions", {}) | report["versions"]
        if "gpu" in report:
            values["gpu"] = report["gpu"]
    return values
