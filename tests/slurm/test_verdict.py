"""Which nodes the check calls bad, from made-up reports; and the check itself on this machine."""

from __future__ import annotations

import json

import pytest

from llmtrain import cli
from llmtrain.config import compose
from llmtrain.slurm import probes
from llmtrain.slurm.verdict import MARK, judge, read_reports, wishes

NODES = ["a", "b", "c", "d"]


def report(rank: int, per_node: int = 2, **facts) -> dict:
    found = {
        "rank": rank,
        "node": NODES[rank // per_node],
        "versions": {"torch": "2.13", "code": "abc"},
        "gpu": "H100",
        "gemm_tflops": 700.0,
        "clock_seconds": 0.001,
        "sum_right": True,
        "all_reduce_gbps": 300.0,
        "exchange_gbps": 40.0,
        "done": True,
    }
    if rank % per_node == 0:
        found |= {
            "disk": {"free_gib": 900.0, "mib_per_second": 500.0},
            "gpus": 2,
            "gpu_errors": [],
        }
    return found | facts


def verdict(*changed: dict, missing: tuple[int, ...] = (), gpus: int = 2, nodes=NODES, **knobs):
    """Judge two ranks a node that are well, but for the changes."""
    reports = {rank: report(rank) for rank in range(2 * len(nodes)) if rank not in missing}
    reports |= {one["rank"]: one for one in changed}
    preflight = {**compose("launch")["preflight"], **knobs}
    wanted = wishes(preflight, gpus=gpus, nodes=len(nodes), run_dir="/x", code=None)
    return judge(list(reports.values()), list(nodes), 2, wanted)


def test_all_is_well():
    found = verdict()
    assert found.good
    assert not found.doubts
    lines = found.table().splitlines()
    assert len(lines) == 5
    assert all(line.split()[-1] == "ok" for line in lines[1:])


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"error": "RuntimeError: CUDA error"}, "RuntimeError: CUDA error"),
        ({"gpus": 1}, "1 GPUs, expected 2"),
        ({"gpu": "A100"}, "gpu A100, where most nodes have H100"),
        ({"gpu_errors": ["GPU 1: slowed down by heat (Active)"]}, "slowed down by heat"),
        ({"gemm_tflops": 500.0}, "rank 2 multiplies matrices at 500 TFLOP/s, the median is 700"),
        ({"disk": {"free_gib": 1.0, "mib_per_second": 500.0}}, "1.0 GiB free in run_dir"),
        ({"disk": {"free_gib": 900.0, "mib_per_second": 2.0}}, "run_dir takes 2.0 MiB/s"),
        ({"versions": {"torch": "2.12"}}, "torch 2.12, where most nodes have 2.13"),
        ({"versions": {"torch": "2.13", "code": "old"}}, "code old, where most nodes have abc"),
    ],
)
def test_a_bad_node(facts, reason):
    found = verdict(report(2, **facts))
    assert list(found.bad) == ["b"]
    assert any(reason in text for text in found.bad["b"])
    assert "BAD" in found.table()
    assert f"bad node b: {found.bad['b'][0]}" in found.table()


def test_a_node_that_does_not_answer():
    found = verdict(missing=(4, 5))
    assert found.bad == {"c": ["0 of 2 ranks answered within 300 s"]}


def test_a_clock_is_compared_with_the_median():
    ahead = [report(rank, clock_seconds=-60.0) for rank in range(2, 8)]
    assert list(verdict(*ahead).bad) == ["a"]  # rank 0's own is wrong
    assert list(verdict(*[report(r, clock_seconds=5.0) for r in (6, 7)]).bad) == ["d"]


def test_slow_on_a_cpu_is_no_fault_unless_asked():
    slow = report(2, gemm_tflops=0.001, exchange_gbps=0.001)
    assert "b" not in verdict(slow, gpus=0).bad
    assert list(verdict(slow, gpus=0, gemm_share=0.5).bad) == ["b"]


def test_slow_links():
    """The link into c and the one out of it: c is to blame. One alone may be either end's fault."""
    into = [report(rank, exchange_gbps=4.0) for rank in (4, 5)]
    out = [report(rank, exchange_gbps=4.0) for rank in (6, 7)]
    assert verdict(*into, *out).bad.keys() == {"c"}
    alone = verdict(*into)
    assert alone.good
    assert alone.doubts == ["the link into c is slow: 4 GB/s, the median is 40"]


def test_ranks_that_never_met():
    waited = report(0, missing=[2, 3])
    assert list(verdict(waited).bad) == ["b"]
    assert verdict(report(0, missing=list(range(2, 8)))).bad == {"a": ["no other node reaches it"]}


def test_failures_that_nobody_can_be_blamed_for():
    wrong = verdict(*[report(rank, sum_right=False) for rank in range(8)])
    assert not wrong.good
    assert not wrong.bad
    assert wrong.failures == ["the sum over all ranks (all-reduce) is wrong"]
    broken = verdict(*[report(rank, group_error="DistBackendError: x") for rank in range(8)])
    assert broken.failures == ["DistBackendError: x"]
    hung = report(3)
    del hung["done"]
    assert "ranks 3 did not end their exchange" in verdict(hung).failures[0]
    # explained by a node that is bad already
    assert not verdict(report(2, gpus=1), hung).failures


def test_reports_among_other_output():
    lines = [
        "a warning",
        f"{MARK}{json.dumps({'rank': 1, 'x': 1})}",
        f"0: {MARK}{json.dumps({'rank': 0})}",
        f"{MARK}{json.dumps({'rank': 1, 'x': 2})}",
        f'{MARK}{{"rank": 2, "cut',
    ]
    assert read_reports(lines) == [{"rank": 0}, {"rank": 1, "x": 2}]


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *(("0", False), ("3", True), ("[N/A]", False), ("No", False), ("Yes", True)),
        *(("Active", True), ("Not Active", False), ("[Not Supported]", False)),
    ],
)
def test_fields_of_nvidia_smi(value, wrong):
    assert probes.is_error(value) == wrong


def test_nvidia_smi(monkeypatch, tmp_path):
    """A driver that lacks a field, and one whose second GPU has errors."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "*ecc*) printf '0\\n7\\n';;\n"
        "*thermal*) printf 'Not Active\\nActive\\n';;\n"
        "*driver_version*) printf '570.1\\n570.1\\n';;\n"
        "*) echo 'Field is not a valid field' ; exit 2;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert probes.gpu_errors() == [
        "GPU 1: uncorrected memory errors (7)",
        "GPU 1: slowed down by heat (Active)",
    ]
    assert probes.driver() == {"driver": "570.1"}


def test_preflight_by_hand(tmp_path, capsys):
    """Two ranks of this machine measure, sum and compare; then a disk that is too small."""
    out = tmp_path / "check.json"
    arguments = ["preflight", "tasks_per_node=2", f"run_dir={tmp_path / 'run'}", f"out={out}"]
    assert cli.main([*arguments, "preflight.timeout_seconds=120"]) == 0
    (node,) = json.loads(out.read_text())["nodes"].values()
    assert node["ranks"] == 2
    assert node["gemm_tflops"] > 0
    assert node["all_reduce_gbps"] > 0
    assert abs(node["clock_seconds"]) < 1
    assert node["mib_per_second"] > 0
    assert not list((tmp_path / "run").iterdir())
    capsys.readouterr()
    assert cli.main(["preflight", f"run_dir={tmp_path}", "preflight.disk_gib=100000"]) == 1
    assert "GiB free in run_dir, expected preflight.disk_gib=100000" in capsys.readouterr().out


def test_preflight_reads_few_keys(capsys):
    assert cli.main(["preflight", "nodes=3"]) == 2
    assert "nodes=3: has no effect on `llmtrain preflight`" in capsys.readouterr().err
