"""scripts/coord_check.py: nothing grows with the width in muP, for every mixer; else it does."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import coord_check  # noqa: E402
from coord_check import arms, measure, report  # noqa: E402

sys.path.remove(str(SCRIPTS))

# Values that shrink: a single key head, a random one of a fixed size, starts with 1 / width.
SHRINKS = -0.7
CHANGES = [f"{place}_change" for place in measure.PLACES if place != "hidden"]


def growths(arm: str, *, mup: bool, widths: tuple[int, ...], seeds: int) -> dict[str, float]:
    """Place -> slope of the change that 4 steps make."""
    last = {
        width: [
            measure.course(arm, width, mup=mup, seed=seed, steps=4, lr=1e-2)[-1]
            for seed in range(seeds)
        ]
        for width in widths
    }
    return {
        place: measure.slope(widths, [statistics.mean(r[place] for r in last[w]) for w in widths])
        for place in CHANGES
        if place in last[widths[0]][0]
    }


def test_module_is_the_scripts():
    assert Path(coord_check.__file__).parent == SCRIPTS / "coord_check"


def test_slope():
    assert measure.slope([64, 128, 256], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert measure.slope([64, 256], [3.0, 3.0]) == pytest.approx(0.0)


@pytest.mark.parametrize("arm", ["attention", "mamba2"])
def test_nothing_grows_in_mup(arm):
    widths = (64, 256)
    found = growths(arm, mup=True, widths=widths, seeds=1)
    assert all(SHRINKS < value < report.GROWS for value in found.values()), found
    plain = growths(arm, mup=False, widths=widths, seeds=1)
    assert all(plain[place] > found[place] + 0.1 for place in found), (found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("arm", arms.ARMS)
def test_nothing_grows_in_mup_whatever_the_parts(arm):
    found = growths(arm, mup=True, widths=(64, 128, 256), seeds=2)
    if arm == "moe_fixed_experts":  # both factors of a gated product start with 1 / width
        assert found.pop("channel_change") < report.GROWS
    assert all(SHRINKS < value < report.GROWS for value in found.values()), found


@pytest.mark.slow
def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    import runpy

    script = runpy.run_path(str(SCRIPTS / "coord_check.py"))
    small = ["--out", str(tmp_path), "--arms", "attention", "--widths", "64", "128"]
    small += ["--seeds", "0", "--steps", "1", "--rate-arms", "attention", "--rate-widths", "64"]
    small += ["--rates", "0.01", "--rate-steps", "6", "--rate-seeds", "0"]
    script["main"](["check", "rates", "report", *small])
    rows = (tmp_path / "check.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 2 * 2  # parametrisations, widths, steps 0 and 1
    script["main"](["check", "rates", *small])
    assert (tmp_path / "check.jsonl").read_text().splitlines() == rows
    text = (tmp_path / "tables.md").read_text()
    assert "| attention | muP |" in text
    assert "| attention | standard | 64 | **" in text
    assert (tmp_path / "check.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_arm_is_a_model_at_every_width():
    for arm in arms.ARMS:
        for mup in (True, False):
            config = arms.configuration(arm, 128, mup=mup, lr=1e-2, seed=0, layers=2)
            assert config["model"]["d_model"] == 128
