"""Passkey prompts fill their length exactly, and the scores say who found the key."""

import re

import lm_eval.api.model
import matplotlib.image
import pytest
from llmtrain_eval import passkey
from llmtrain_eval.harness import evaluate, load_tasks
from tokenizers import normalizers

LENGTHS, DEPTHS = (96, 128, 200, 333), (0.0, 0.3, 0.5, 1.0)


@pytest.fixture
def prompts(tokenizer_file):
    def make(lengths=LENGTHS, depths=DEPTHS, samples=3, seed=0, add_bos=True, file=tokenizer_file):
        return passkey.make_prompts(str(file), add_bos, lengths, depths, samples, seed)

    return make


@pytest.mark.parametrize("add_bos", [True, False])
def test_prompts_fit_and_one_more_word_would_not(prompts, tokenizer, add_bos):
    def count(text):
        return len(tokenizer.encode(text).ids) + add_bos

    made = prompts(add_bos=add_bos)
    assert len(made) == len(LENGTHS) * len(DEPTHS) * 3
    for doc in made:
        assert doc["tokens"] == count(doc["prompt"]) <= doc["length"] - passkey.ANSWER_TOKENS
        words = len(doc["prompt"].split()) - len(passkey.build(doc["key"], 0, 0).split())
        assert passkey.build(doc["key"], doc["depth"], words) == doc["prompt"]
        longer = passkey.build(doc["key"], doc["depth"], words + 1)
        assert count(longer) > doc["length"] - passkey.ANSWER_TOKENS
        # prompt and answer fit into the length
        assert count(doc["prompt"] + doc["choices"][0]) <= doc["length"]


def test_the_key_stands_between_sentences_at_its_depth(prompts):
    for doc in prompts(lengths=(400,), depths=(0.0, 0.25, 0.5, 0.75, 1.0)):
        hay = doc["prompt"][len(passkey.INTRODUCTION) : -len(passkey.QUESTION)]
        needle = passkey.NEEDLE.format(key=doc["key"])
        before, after = hay.split(needle)
        assert before == "" or before.endswith(". ")
        depth = len(before.split()) / len((before + after).split())
        assert depth == pytest.approx(doc["depth"], abs=0.04)
        assert hay.endswith(".")


def test_choices(prompts, tokenizer):
    golds = set()
    for doc in prompts():
        numbers = [choice.strip() for choice in doc["choices"]]
        assert len(set(numbers)) == passkey.CHOICES
        assert all(len(number) == passkey.DIGITS for number in numbers)
        assert numbers[doc["gold"]] == doc["key"]
        assert [number for number in numbers if number in doc["prompt"]] == [doc["key"]]
        assert len({len(tokenizer.encode(choice).ids) for choice in doc["choices"]}) == 1
        golds.add(doc["gold"])
    assert len(golds) > 5


def test_prompts_depend_on_the_seed_and_their_cell_only(prompts):
    few = prompts(lengths=(128,), depths=(0.5,))
    among = [doc for doc in prompts() if (doc["length"], doc["depth"]) == (128, 0.5)]
    assert list(few) == among
    assert [doc["key"] for doc in prompts(seed=1)] != [doc["key"] for doc in prompts()]


def test_lengths_below_the_question_are_refused(prompts):
    with pytest.raises(ValueError, match=r"passkey.lengths: .* room for 17 tokens") as e:
        prompts(lengths=(30,))
    missing = int(re.search(r"raise the length by (\d+)", str(e.value)).group(1))
    assert prompts(lengths=(30 + missing,))
    with pytest.raises(ValueError, match=r"raise the length by 1$"):
        prompts(lengths=(29 + missing,))


def test_tokenizers_that_stretch_numbers_are_refused(prompts, tokenizer, tmp_path):
    tokenizer.normalizer = normalizers.Replace("8", "8888")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"needs 21 tokens for a number of 5 digits, .* 12"):
        prompts(file=tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 12345", 1),
        ("12345.", 1),
        (" is 12345, or 99999", 1),
        (" 1234", 0),
        (" 123456", 0),
        ("", 0),
    ],
)
def test_the_first_number_counts(text, score):
    assert passkey.score_generation({"key": "12345"}, [text]) == {"exact_match": score}


def test_lengths_and_what_the_model_can_take():
    assert passkey.check_grid([128, 256], [0.5], limit=256, trained=256) == []
    (warning,) = passkey.check_grid([128, 256, 512], [0.5], limit=None, trained=128)
    assert "[256, 512] are longer than the 128 tokens a row" in warning
    message = r"passkey.lengths: got 512, expected at most 256, .*model.max_seq_len.*; lower"
    with pytest.raises(ValueError, match=message):
        passkey.check_grid([128, 512], [0.5], limit=256, trained=128)


def test_grids_that_are_none():
    with pytest.raises(ValueError, match=r"passkey: got lengths \[\] .*at least one of each; set"):
        passkey.check_grid([], [0.5], limit=None, trained=128)
    with pytest.raises(ValueError, match=r"passkey: got lengths \[128\] and depths \[\], expected"):
        passkey.check_grid([128], [], limit=None, trained=128)
    with pytest.raises(ValueError, match=r"passkey.depths: got \[-0.1, 25\], expected 0 .* to 1"):
        passkey.check_grid([128], [-0.1, 0.5, 25], limit=None, trained=128)


class Reader(lm_eval.api.model.LM):
    """Finds the key by reading; for prompts longer than `sees` characters it guesses."""

    def __init__(self, sees):
        super().__init__()
        self.sees = sees
        self.refuse_truncation = set()

    def find(self, prompt):
        key = re.search(r"The pass key is (\d+)", prompt).group(1)
        return key if len(prompt) < self.sees else "10000"

    def loglikelihood(self, requests):
        return [(float(r.args[1].strip() == self.find(r.args[0])), False) for r in requests]

    def generate_until(self, requests):
        assert all(r.args[1]["max_gen_toks"] == passkey.ANSWER_TOKENS for r in requests)
        return [f" {self.find(r.args[0])}." for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def metadata(tokenizer_file, **wanted):
    return {"tokenizer_file": str(tokenizer_file), "add_bos": True, "passkey": wanted}


def test_a_model_that_reads_short_texts_only(tokenizer_file, tmp_path):
    """Through lm-eval's evaluator, to the grid and its picture."""
    wanted = {"lengths": [112, 150, 400], "depths": [0.0, 1.0], "samples": 4, "seed": 0}
    loaded = load_tasks(["passkey"], metadata=metadata(tokenizer_file, **wanted))
    scores, samples = evaluate(Reader(sees=500), loaded)
    assert scores["passkey_generate"]["exact_match"] == pytest.approx(2 / 3)
    assert scores["passkey_generate"]["samples"] == 24
    assert scores["passkey_generate"]["exact_match_stderr"] > 0
    grid = passkey.grid(samples)
    assert (grid["lengths"], grid["depths"], grid["samples"]) == ([112, 150, 400], [0.0, 1.0], 4)
    assert grid["generate"] == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert grid["likelihood"][:2] == [[1.0, 1.0], [1.0, 1.0]]
    # where it guesses, all answers are equal and the first wins
    firsts = [s["doc"]["gold"] == 0 for s in samples["passkey_choice"] if s["doc"]["length"] == 400]
    assert sum(grid["likelihood"][2]) / 2 == pytest.approx(sum(firsts) / len(firsts))

    picture = tmp_path / "passkey.png"
    passkey.plot(grid, picture, title="reader", trained=150)
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.1


def test_a_model_with_too_short_a_context_is_refused(make_lm, tokenizer_file):
    wanted = {"lengths": [128], "depths": [0.5], "samples": 1, "seed": 0}
    loaded = load_tasks(["passkey"], metadata=metadata(tokenizer_file, **wanted))
    with pytest.raises(ValueError, match=r"task passkey_\w+: a request has .* expected at most"):
        evaluate(make_lm(max_length=100), loaded)
