import multiprocessing
import os
import signal

import numpy as np
import pytest
from llmtrain_data.encode import Segment, cut, encode_segments
from llmtrain_data.tokenizer import Bpe, train_bpe


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_bpe(texts, Bpe(vocab_size=320))


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("encode") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def segments(texts):
    for index, text in enumerate(texts):
        data = text.encode()
        yield Segment(text=text, bytes=len(data), target=("train", "x"), content=bytes([index % 7]))


def test_cut_gives_the_text_back(texts):
    text = "\n".join(texts)
    for limit in (1, 7, 100, len(text) - 1, len(text), 10**9):
        parts = cut(text, limit)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= limit
    assert cut("", 5) == [""]


def test_parts_of_a_document_have_its_tokens(texts, tokenizer):
    text = "\n\n  ".join(texts[:50]) + "\n".join(texts[50:100])
    whole = tokenizer.encode(text).ids
    for limit in (300, 1000, 5000):
        parts = cut(text, limit)
        assert len(parts) > 5
        assert [token for part in parts for token in tokenizer.encode(part).ids] == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_order_and_tokens(texts, tokenizer, file, workers):
    many = texts * 40  # several batches
    results = list(
        encode_segments(segments(many), tokenizer_path=file, tokenizer_sha256="", workers=workers)
    )
    assert [result.segment for result in results] == list(segments(many))
    for result in results[:: len(many) // 50]:
        assert result.tokens_T.tolist() == tokenizer.encode(result.segment.text).ids
        assert result.tokens_T.dtype == np.uint16
    assert multiprocessing.active_children() == []


def test_nothing_to_encode(file):
    empty = encode_segments(iter(()), tokenizer_path=file, tokenizer_sha256="", workers=1)
    assert list(empty) == []


def test_a_worker_that_dies_is_reported(texts, file, message):
    results = encode_segments(
        segments(texts * 200), tokenizer_path=file, tokenizer_sha256="", workers=2
    )
    next(results)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with message("tokenizing processes died", "memory", "data.workers lower"):
        list(results)
