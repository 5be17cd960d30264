"""scripts/mixers_learn.py: equal parameters, batches, restart, crash of an arm, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL = (
    *("--device", "cpu", "--jobs", "1", "--heads", "2", "--rates", "3e-3", "1e-2"),
    *("--recall-steps", "6", "--recall-sizes", "32:4", "16:2", "--recall-tested", "64:8"),
    *("--recall-vocab", "128", "--recall-step-tokens", "128", "--recall-widths", "16"),
    *("--test-questions", "64", "--groups", "s3", "--state-steps", "5", "--state-widths", "16"),
    *("--state-tokens", "8", "--state-lengths", "8", "16", "--state-step-tokens", "64"),
    *("--test-rows", "16"),
)


@pytest.fixture(scope="module")
def learn():
    """The script's modules: its folder is on the path, as it is when the script runs."""
    sys.path.insert(0, str(SCRIPTS))
    import mixers_learn
    from mixers_learn import arms, jobs, report, results, tasks, training, workers

    sys.path.remove(str(SCRIPTS))
    assert Path(mixers_learn.__file__).parent == SCRIPTS / "mixers_learn"
    modules = {"arms": arms, "jobs": jobs, "report": report, "results": results}
    return type("Learn", (), modules | {"tasks": tasks, "training": training, "workers": workers})


@pytest.mark.parametrize("layers", [2, 8])
def test_arms_have_equal_parameters(learn, layers):
    """Every arm, at the widths of both parts; counted here from the shapes of the model."""
    from llmtrain import build

    for arm in learn.arms.ARMS.values():
        matched = learn.arms.match(
            arm,
            ["model.n_heads=4"],
            d_model=128,
            layers=layers,
            vocab_size=100,
            synthetic=layers == 2,
        )
        model = build.build_model(matched.config, vocab_size=100, device="meta")
        body = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("embedding"))
        if arm.name == "moe":
            assert matched.body < body
        else:
            assert matched.body == body
        assert abs(matched.body / matched.target - 1) <= 0.02, arm.name
        assert matched.target == pytest.approx(layers * (4 * 128**2 + 8 * 128**2), rel=0.01)


def test_batches_depend_on_seed_and_step_alone(learn):
    task = learn.tasks.Recall(
        sizes=((32, 4), (64, 8)), tested=(), vocab_size=256, step_tokens=256, test_questions=16
    )
    device = torch.device("cpu")

    def tokens(seed, step):
        name = f"recall/{step}"
        return task.batch(step, learn.tasks.seeded(device, seed, name)).tokens_BT

    assert tokens(0, 3).equal(tokens(0, 3))
    assert tokens(0, 3).shape == (4, 64)
    assert tokens(0, 2).shape == (8, 32)
    assert not tokens(0, 3).equal(tokens(1, 3))
    assert not tokens(0, 3).equal(tokens(0, 5))


def test_scores_of_known_answers(learn):
    problem = learn.tasks.WordProblem(
        name="s3", tokens=4, lengths=(4, 8), step_tokens=16, test_rows=2
    )
    correct = torch.tensor([[1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).float()
    assert problem.scores([correct]) == {"4": 0.75, "8": 0.25}
    assert problem.chance == 1 / 6


def test_learner_learns(learn):
    """Parity of one and two bits: solved in seconds by a model that can, so the loop does train."""
    matched = learn.arms.match(
        learn.arms.ARMS["attention"],
        ["model.n_heads=2", "schedule.warmup_fraction=0.1"],
        d_model=32,
        layers=1,
        vocab_size=3,
        synthetic=True,
    )
    task = learn.tasks.WordProblem(
        name="parity", tokens=3, lengths=(2, 3), step_tokens=128, test_rows=64
    )
    learners = [
        learn.training.Learner(
            matched.config,
            vocab_size=3,
            lr=lr,
            steps=240,
            device=torch.device("cpu"),
            graph=False,
        )
        for lr in (0.0, 1e-2)
    ]
    done, _ = learn.training.train_together(learners, task, seed=0, seconds=None)
    tests = task.tests(learn.tasks.seeded(torch.device("cpu"), 0, "test"))
    still, learned = ([learner.correct(tests[0])] for learner in learners)
    assert done == 240
    assert task.scores(learned) == {"2": 1.0, "3": 1.0}
    assert task.scores(still)["3"] < 0.8
    points = learn.training.curve(learners[1].losses, points=6)
    assert [step for step, _ in points] == [40, 80, 120, 160, 200, 240]
    assert points[-1][1] < 0.1 < points[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "mla", "moe", "recurrent_depth"])
def test_attention_and_its_kin_solve_recall(learn, name):
    """Short rows, with which none of them stays at naming values whose keys it does not know."""
    task = learn.tasks.Recall(
        sizes=((16, 2), (32, 4)), tested=(), vocab_size=128, step_tokens=1024, test_questions=256
    )
    matched = learn.arms.match(
        learn.arms.ARMS[name],
        [*learn.workers.COMMON, "model.n_heads=2", "model.n_kv_heads=2"],
        d_model=64,
        layers=2,
        vocab_size=task.vocab_size,
        synthetic=True,
    )
    device = torch.device("cpu")
    learner = learn.training.Learner(
        matched.config, vocab_size=128, lr=3e-3, steps=1000, device=device, graph=False
    )
    for block in learner.model.stack.blocks:
        if name == "moe":
            block.channel.backend = "loop"  # the arm's computes all experts, for CUDA graphs
    for step in range(250):
        learner.step(step, task.batch(step, learn.tasks.seeded(device, 0, f"recall/{step}")))
    tests = task.tests(learn.tasks.seeded(device, 0, "test"))
    scores = task.scores([learner.correct(examples) for examples in tests])
    assert min(scores.values()) > 0.9, scores  # one value of the row: 0.5 and 0.25


def test_recurrent_depth_scales_embeddings_to_length_one(learn):
    for synthetic in (True, False):
        size = {"layers": 8, "synthetic": synthetic}
        chosen = learn.arms.ARMS["recurrent_depth"].chosen(width=512, **size)
        assert "embedding.scale=22.6274" in chosen


def run_script(*arguments, ok=True):
    command = [sys.executable, SCRIPTS / "mixers_learn.py", *arguments]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert (ran.returncode == 0) == ok, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_script(tmp_path):
    """Both synthetic parts and the report; a second start has nothing left to do."""
    run_script("recall", "state", "report", "--out", tmp_path, "--arms", "attention", *SMALL)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["task"], row["lr"]) for row in rows] == [
        ("recall", 3e-3),
        ("recall", 1e-2),
        ("s3", 3e-3),
        ("s3", 1e-2),
    ]
    assert all(row["finished"] and min(row["accuracy"].values()) >= 0 for row in rows)
    assert list(rows[0]["accuracy"]) == ["32:4", "16:2", "64:8"]
    assert list(rows[2]["accuracy"]) == ["8", "16"]
    assert len(rows[0]["curve"]) == 6
    assert (rows[0]["tokens"], rows[2]["tokens"]) == (6 * 128, 5 * 64)
    table = (tmp_path / "tables.md").read_text()
    assert "| attention |" in table
    assert (tmp_path / "mixers.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "mixers.json").read_text())) == 4
    run_script("recall", "--out", tmp_path, "--arms", "attention", *SMALL)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_books(tmp_path):
    """The better of two rates, each by `llmtrain train` on a prepared corpus."""
    from llmtrain.config import compose
    from llmtrain.prep import run_prep

    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"The number after {number} is {number + 1}. " * 60)
    corpus = [f"data.sources.text.root={texts}", f"data.root={tmp_path}", "data.val_fraction=0.2"]
    corpus += ["data.workers=1", "tokenizer.vocab_size=300"]
    run_prep(compose("prep", ["data=text", *corpus]))
    run_script(
        *("books", "report", "--out", out, "--device", "cpu", "--arms", "mamba2", "--data", "text"),
        *("--data-override", *corpus, "--book-vocab", 300, "--book-tokens", 2048),
        *("--book-step-tokens", 512, "--book-seq-len", 64),
        *("--micro-batch", 4, "--book-width", 64, "--book-layers", 2, "--book-heads", 2),
        *("--val-tokens", 256, "--book-rates", "1e-5", "1e-2"),
    )
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert (row["finished"], row["tokens"], row["lr"]) == (True, 2048, 1e-2)
    assert row["rates"]["0.01"] == row["bits_per_byte"] < row["rates"]["1e-05"]
    assert "| Mamba-2 |" in (out / "tables.md").read_text()


def test_one_failing_arm_costs_no_other(tmp_path, learn, capsys):
    def job(name, code, retry=None):
        retry = None if retry is None else [sys.executable, "-c", retry]
        return learn.jobs.Job(name, [sys.executable, "-c", code], retry)

    good = f"open({str(tmp_path / 'done')!r}, 'a').write('x')"
    todo = [job("bad", "raise SystemExit(3)"), job("again", "1 / 0", good), job("good", good)]
    failed = learn.jobs.run(todo, at_once=2, logs=tmp_path / "logs", deadline=None)
    assert failed == ["bad"]
    assert (tmp_path / "done").read_text() == "xx"
    assert "ZeroDivisionError" in (tmp_path / "logs" / "again.log").read_text()
    assert "bad (exit 3)" in capsys.readouterr().out


def test_deadline_stops_what_runs(tmp_path, learn):
    def sleeper(name):
        return learn.jobs.Job(name, [sys.executable, "-c", "import time; time.sleep(60)"], None)

    todo = [sleeper("one"), sleeper("two")]
    failed = learn.jobs.run(todo, at_once=1, logs=tmp_path / "logs", deadline=0.5)
    assert failed == ["one", "two"]
    assert todo[0].process.returncode != 0
    assert todo[1].process is None


def test_report_takes_the_best_rate_and_averages_seeds(learn):
    def row(lr, seed, value):
        accuracy = {"64": value, "128": value / 2}
        return {"task": "s3", "width": 8, "arm": "attention", "lr": lr, "seed": seed} | {
            "accuracy": accuracy,
            "finished": True,
        }

    rows = [row(1e-3, 0, 0.9), row(1e-3, 1, 0.1), row(3e-3, 0, 0.6), row(3e-3, 1, 0.8)]
    (chosen,) = learn.report.best(rows).values()
    assert chosen["lr"] == 3e-3
    assert chosen["seeds"] == 2
    assert chosen["accuracy"] == pytest.approx({"64": 0.7, "128": 0.35})
