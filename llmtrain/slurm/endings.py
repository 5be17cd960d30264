"""Why the ranks ended: from their notes, the states of their nodes, and the watchdog's verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from llmtrain.slurm import cluster
from llmtrain.slurm.cluster import SlurmError
from llmtrain.slurm.decide import CAUSES
from llmtrain.slurm.rank import describe
from llmtrain.slurm.submission import BEGAN, Submission

STEP_NAME = re.compile(r"step-(\d{8,})")
# Of a watchdog's verdict: ranks that gave no report, or stand where the others do not wait.
GUILTY = re.compile(r"(?m)^(?:silent|lags) +rank (\d+)")
# States of nodes that have gone, as scontrol writes them.
GONE = ("DOWN", "NOT_RESPONDING", "FAIL")


def read_records(start: Path) -> list[dict]:
    """What the ranks of a start noted, earliest first."""
    files = start.glob("rank-*.json")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(records, key=lambda record: record["time"])


def outcome(submission: Submission, start: Path, nodes: Sequence[str], code: int) -> dict:
    """Cause, reason and nodes to exclude (fields of Ended). code: of srun."""
    if gone := lost(nodes):
        return {"cause": "lost", "why": f"lost node {', '.join(gone)}", "exclude": tuple(gone)}
    records = read_records(start)
    failed = [record for record in records if CAUSES.get(record["code"]) != "finished"]
    ranks = len(nodes) * submission.tasks_per_node
    if not failed:
        if len(records) == ranks and code == 0:
            return {"cause": "finished", "why": "finished"}
        silent = sorted(set(range(ranks)) - {record["rank"] for record in records})
        shown = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        return {"cause": "lost", "why": f"ranks {shown} were killed (srun: exit code {code})"}
    for cause in ("mistake", "hung"):  # other ranks may end earlier, and in other ways
        of_it = [record for record in failed if CAUSES.get(record["code"]) == cause]
        if of_it:
            named = blamed(submission, start, nodes) if cause == "hung" else ()
            return {"cause": cause, "why": words(of_it[0]), "exclude": named}
    others = [record for record in failed if CAUSES.get(record["code"]) != "stopped"]
    if not others:
        step = newest_step(Path(submission.run_dir))
        return {"cause": "stopped", "why": f"stopped on a signal, newest checkpoint of step {step}"}
    return {"cause": "lost" if others[0]["code"] < 0 else "failure", "why": words(others[0])}


def blamed(submission: Submission, start: Path, nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes of the ranks that, says the watchdog, held the others up; none when it is all."""
    files = sorted((Path(submission.run_dir) / "hangs").glob("*/verdict.txt"))
    if not files or files[-1].stat().st_mtime < (start / BEGAN).stat().st_mtime:
        return ()
    ranks = GUILTY.findall(files[-1].read_text(encoding="utf-8"))
    named = {nodes[int(rank) // submission.tasks_per_node] for rank in ranks}
    return tuple(sorted(named)) if len(named) < len(nodes) else ()


def words(record: dict) -> str:
    said = f": {record['said']}" if record["said"] and record["code"] > 0 else ""
    ended = describe(record["code"])
    return f"rank {record['rank']} on {record['node']} ended with {ended}{said}"


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest finished checkpoint, good or not."""
    found = (STEP_NAME.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(match.group(1)) for match in found if match), default=None)


def lost(nodes: Sequence[str]) -> list[str]:
    """Those of the nodes that have gone."""
    return [node for node in nodes if node_state(node).intersection(GONE)]


def node_state(node: str) -> set[str]:
    """The words of a node's state: {"IDLE", "DRAIN"}; empty when the controller does not answer."""
    try:
        text = cluster.run(["scontrol", "--oneliner", "show", "node", node])
    except SlurmError:
        return set()
    return parse_state(text)


def parse_state(text: str) -> set[str]:
    """Of `scontrol --oneliner show node`: a * says that the node does not answer."""
    match = re.search(r"\bState=(\S+)", text)
    if match is None:
        return set()
    words = set(filter(None, re.split(r"[+*~#!%$@^-]", match.group(1))))
    return words | ({"NOT_RESPONDING"} if "*" in match.group(1) else set())
