"""next_line: the right answer follows the context in a held-out document, the others do not."""

import shutil

import pytest
from llmtrain_data.manifest import Manifest, open_split
from llmtrain_data.prepare import prepare
from llmtrain_data.sources import LocalFiles
from llmtrain_data.tokenizer import Existing
from llmtrain_eval.harness import evaluate, load_tasks
from llmtrain_eval.next_line import SHORTEST, make_questions


@pytest.fixture(scope="module")
def texts(corpus, tokenizer_file):
    """The held-out documents."""
    from llmtrain_data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_file)
    return [
        tokenizer.decode(shard.tokens[first:last].tolist())
        for shards in open_split(corpus, Manifest.load(corpus), "val").values()
        for shard in shards
        for first, last in zip(shard.starts[:-1], shard.starts[1:])
    ]


@pytest.fixture
def questions(corpus, tokenizer):
    def make(corpus=corpus, **options):
        options = {"room": 63, "items": 40, "context_lines": 5, "seed": 0, **options}
        return make_questions(str(corpus), tokenizer, **options)

    return make


def test_the_right_answer_follows(questions, texts):
    made = questions()
    assert len(made) == 40
    for question in made:
        right = question["context"] + question["choices"][question["gold"]]
        sources = [text for text in texts if right in text]
        assert len(sources) >= 1
        for number, choice in enumerate(question["choices"]):
            assert choice.startswith("\n")
            assert len(choice.strip()) >= SHORTEST
            if number != question["gold"]:
                assert not any(question["context"] + choice in text for text in sources)
                assert any(choice.strip() in text for text in texts)
        assert len({choice.strip() for choice in question["choices"]}) == 4
    assert {question["gold"] for question in made} == {0, 1, 2, 3}
    assert {question["source"] for question in made} == {"one", "two"}


def test_questions_fit_and_lose_whole_lines(questions, tokenizer, texts):
    lines = [1 + q["context"].count("\n") for q in questions(room=2000)]
    assert max(lines) == 5
    for question in questions(room=40):
        longest = max(len(tokenizer.encode(choice).ids) for choice in question["choices"])
        assert len(tokenizer.encode(question["context"]).ids) + longest <= 40
        assert any(f"\n{question['context']}\n" in f"\n{text}" for text in texts)


def test_lengths_do_not_give_the_answer_away(questions):
    """The right answer is about as often the shortest or longest as any other."""
    made = questions(items=200)
    ranks = [
        sorted(map(len, question["choices"])).index(len(question["choices"][question["gold"]]))
        for question in made
    ]
    assert 0.8 < sum(ranks) / len(ranks) < 2.2


def test_the_seed_decides(questions):
    assert questions() == questions()
    assert questions() != questions(seed=1)


def test_fewer_questions_than_asked_for_are_logged(questions, caplog):
    made = questions(items=100_000)
    assert 100 < len(made) < 100_000
    assert f"the held-out text gives {len(made)} questions, not 100000" in caplog.text


def held_out_corpus(folder, tokenizer_file, text):
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    (folder / "train" / "a.txt").write_text("the model reads\n" * 30)
    (folder / "val" / "a.txt").write_text(text)
    prepare(
        out_dir=folder / "corpus",
        sources={"a": LocalFiles(str(folder / "train"))},
        val_sources={"a": LocalFiles(str(folder / "val"))},
        tokenizer=Existing(path=str(tokenizer_file)),
        val_fraction=0.0,
        workers=1,
    )
    return folder / "corpus"


def test_a_single_document_asks_about_itself(questions, tokenizer_file, tmp_path):
    lines = [f"line {i} of a single text, green and {i * 7} blue" for i in range(60)]
    corpus = held_out_corpus(tmp_path, tokenizer_file, "\n".join(lines))
    for question in questions(corpus=corpus, room=200, items=20):
        last = int(question["context"].split("\n")[-1].split()[1])
        numbers = [int(choice.split()[1]) for choice in question["choices"]]
        assert numbers[question["gold"]] == last + 1
        assert all(abs(n - last - 1) > 5 for i, n in enumerate(numbers) if i != question["gold"])


def test_held_out_text_without_lines_is_refused(questions, tokenizer_file, tmp_path):
    corpus = held_out_corpus(tmp_path, tokenizer_file, "one single line of text and no other")
    message = r"next_line: the held-out text of corpus .* no question, expected .*val_fraction"
    with pytest.raises(ValueError, match=message):
        questions(corpus=corpus)
    shutil.rmtree(corpus)
    with pytest.raises(ValueError, match=r"corpus .*cannot read manifest.json"):
        questions(corpus=corpus)


def test_as_a_task(make_lm, corpus, tokenizer_file):
    """The model's choice is the likeliest line; a tokenizer file is all that the task needs."""
    metadata = {
        "corpus": str(corpus),
        "tokenizer_file": str(tokenizer_file),
        "add_bos": True,
        "max_length": 64,
        "next_line": {"items": 12, "context_lines": 4, "seed": 0},
    }
    lm = make_lm()
    scores, samples = evaluate(lm, load_tasks(["next_line"], metadata=metadata))
    assert lm.truncated == {}
    right = [
        max(range(4), key=lambda i: sample["filtered_resps"][i][0]) == sample["doc"]["gold"]
        for sample in samples["next_line"]
    ]
    assert scores["next_line"]["acc"] == sum(right) / 12
    assert {"acc", "acc_norm", "acc_bytes", "acc_stderr"} < set(scores["next_line"])
    by_bytes = [
        max(
            range(4),
            key=lambda i: (
                sample["filtered_resps"][i][0] / len(sample["doc"]["choices"][i].encode())
            ),
        )
        == sample["doc"]["gold"]
        for sample in samples["next_line"]
    ]
    assert scores["next_line"]["acc_bytes"] == sum(by_bytes) / 12
