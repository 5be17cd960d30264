"""The table, from results to Markdown."""

from llmtrain_eval import report

RESULTS = {
    "checkpoint": {"path": "runs/x/checkpoints/step-00000001", "step": 1, "sha256": "ab" * 32},
    "environment": {"device": "cpu", "precision": "fp32", "ranks": 2, "seconds": 3.4},
    "warnings": ["task x: something"],
    "bits_per_byte": {"model": {"bits_per_byte": 1.25}, "empty": {"bits_per_byte": None}},
    "tasks": {
        "arc": {"acc": 0.5, "acc_stderr": 0.1, "perplexity": None, "samples": 40, "shots": 0},
        "gsm": {"exact_match (strict)": 0.25, "exact_match_stderr (strict)": 0.05, "samples": 8},
    },
}


def test_lines():
    assert report.lines(RESULTS) == [
        ("bits_per_byte: model", "bits/byte", 1.25, None, None),
        ("arc", "acc", 0.5, 0.1, 40),
        ("arc", "perplexity", None, None, 40),
        ("gsm", "exact_match (strict)", 0.25, 0.05, 8),
    ]


def test_markdown_is_aligned():
    lines = report.markdown(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[4].split("|")[3].strip() == "n/a"
    assert lines[3] == "| arc                  | acc                  | 0.5000 | 0.1000 |    40 |"


def test_files(tmp_path):
    report.write(RESULTS, tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "cpu, fp32, 2 rank(s), 3 s. Checkpoint sha256 abababababababab." in text
    assert text.rstrip().endswith("- task x: something")
    report.write_samples({"arc": [{"doc": 1}, {"doc": "é"}]}, tmp_path)
    assert (tmp_path / "samples" / "arc.jsonl").read_text() == '{"doc": 1}\n{"doc": "é"}\n'


def test_versions_name_every_package():
    assert set(report.versions()) == {"python", *report.PACKAGES}
    assert report.versions()["torch"][0].isdigit()


def test_an_earlier_evaluation_is_set_aside(tmp_path):
    report.set_aside(tmp_path / "none")  # nothing there: nothing made
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("the user's own")
    for content in ("first", "second"):
        (tmp_path / "results.json").write_text(content)
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "task.jsonl").write_text(content)
        report.set_aside(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "previous-1", "previous-2"]
    assert (tmp_path / "previous-1" / "results.json").read_text() == "first"
    assert (tmp_path / "previous-2" / "samples" / "task.jsonl").read_text() == "second"
