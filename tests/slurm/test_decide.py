"""Which ending of a start leads to what: the table of docs/slurm.md."""

from __future__ import annotations

import pytest

from llmtrain.slurm.decide import Ended, decide


def ended(cause: str, **facts) -> Ended:
    return Ended(cause=cause, why=f"why {cause}", **{"first_step": 10, "step": 20, **facts})


def earlier(*causes: str, advanced: bool = False) -> list[dict]:
    return [{"action": "requeue", "cause": cause, "advanced": advanced} for cause in causes]


@pytest.mark.parametrize(
    ("ending", "action", "code"),
    [
        (ended("finished"), "done", 0),
        (ended("finished", by_slurm="requeues"), "done", 0),
        (ended("mistake"), "end", 2),
        (ended("stopped"), "requeue", 0),
        (ended("stopped", asked=True), "end", 85),
        (ended("stopped", by_slurm="ends"), "end", 85),
        (ended("stopped", by_slurm="requeues"), "wait", 0),
        (ended("stopped", by_slurm="time limit"), "requeue", 0),
        (ended("stopped", by_slurm="preempts"), "requeue", 0),
        (ended("hung"), "requeue", 0),
        (ended("hung", step=10), "requeue", 0),
        (ended("lost"), "requeue", 0),
        (ended("lost", by_slurm="requeues"), "wait", 0),
        (ended("failure"), "requeue", 0),
        (ended("failure", step=10), "end", 1),
        (ended("failure", first_step=None, step=None), "end", 1),
        (ended("failure", first_step=None, step=5), "requeue", 0),
        (ended("bad node", exclude=("n1",)), "requeue", 0),
        (ended("bad node", exclude=("n1",), enough=False), "end", 1),
    ],
)
def test_actions(ending, action, code):
    decision = decide(ending, [], max_restarts=3)
    assert (decision.action, decision.code) == (action, code)
    assert decision.reason


def test_excluded_nodes_go_with_the_requeue():
    decision = decide(ended("hung", exclude=("n2",)), [], max_restarts=3)
    assert decision.exclude == ("n2",)
    assert "without n2" in decision.reason


def test_a_lost_node_is_taken_again_where_it_is_needed():
    decision = decide(ended("lost", exclude=("n2",), enough=False), [], max_restarts=3)
    assert (decision.action, decision.exclude) == ("requeue", ())


def test_failures_are_counted_over_the_whole_job():
    before = earlier("failure", "stopped", "failure", advanced=True)
    assert decide(ended("failure"), before, max_restarts=3).action == "requeue"
    last = decide(ended("failure"), before, max_restarts=2)
    assert (last.action, last.code) == ("end", 1)
    assert "2 restarts after failures are max_restarts=2" in last.reason


def test_hangs_and_losses_are_counted_until_a_checkpoint_comes():
    before = earlier("hung", "lost", "bad node")
    still = ended("hung", step=10)
    assert decide(still, before, max_restarts=4).action == "requeue"
    assert decide(still, before, max_restarts=3).action == "end"
    assert decide(ended("hung"), before, max_restarts=3).action == "requeue"
    progress = [*earlier("hung", "hung"), *earlier("hung", advanced=True), *earlier("lost")]
    assert decide(still, progress, max_restarts=3).action == "requeue"
    assert decide(still, progress, max_restarts=2).action == "end"


def test_a_time_limit_too_short_for_a_step_ends_some_time():
    before = earlier("stopped", "stopped", "stopped")
    last = decide(ended("stopped", step=10), before, max_restarts=3)
    assert last.action == "end"
    assert "without a new checkpoint" in last.reason
