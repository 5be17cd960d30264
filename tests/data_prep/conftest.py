"""Text to prepare, and a check of error messages."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random

import pytest
from llmtrain_data.documents import Document
from llmtrain_data.prepare import prepare
from llmtrain_data.tokenizer import Bpe

WORDS = ["the", "of", "and", "model", "reads", "rows", "tokens", "every", "document", "apart"]
WORDS += ["na\u00efve", "\u00fcber", "12", "345", "x_y", "(", ")", ":"]


def make_text(seed: int, words: int = 60) -> str:
    """Words and lines, the same for the same seed."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", "\n", "\r\n"]) for _ in range(words))


class Listed:
    """A source of the given texts."""

    def __init__(self, texts, name="listed"):
        self.texts, self.name = texts, name

    def describe(self):
        return {"kind": self.name}

    def __iter__(self):
        for index, text in enumerate(self.texts):
            yield Document(text=text, id=str(index))


@pytest.fixture(scope="session")
def texts():
    """300 documents of 0.3 KB or so."""
    return [make_text(seed) for seed in range(300)]


@pytest.fixture
def listed():
    return Listed


@pytest.fixture
def bpe():
    return Bpe(vocab_size=300)


@pytest.fixture
def message():
    """message("part", ..): a ValueError is raised in the block, and says all the parts."""

    @contextlib.contextmanager
    def expect(*parts):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the parts are the match
            yield
        text = str(raised.value)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{text!r} does not say {missing}"

    return expect


@pytest.fixture
def make_corpus(tmp_path, texts, bpe):
    """make_corpus(**changes): a small corpus in tmp_path / "corpus"; returns its manifest."""

    def make(out="corpus", **changes):
        settings = {
            "sources": {"words": Listed(texts)},
            "tokenizer": bpe,
            "val_fraction": 0.1,
            "workers": 1,
            **changes,
        }
        return prepare(out_dir=tmp_path / out, **settings)

    return make
