import json
import random
import sys
import unicodedata

import numpy as np
import pytest
import transformers
from llmtrain_data.tokenizer import (
    EOT,
    Bpe,
    Existing,
    is_plain_byte_level,
    load_tokenizer,
    split_pattern,
    token_bytes,
    train_bpe,
    vocab_span,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers


@pytest.fixture(scope="module")
def trained(texts):
    tokenizer = train_bpe(texts, Bpe(vocab_size=320))
    tokenizer.encode_special_tokens = True
    return tokenizer


def nasty_texts():
    """Text that tokenizers stumble over."""
    draw = random.Random(0)
    every = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) != "Cs"]
    yield "".join(draw.sample(every, 20_000))
    yield "".join(draw.choice(" \n\r\t\u00a0ab1.,'\u0301") for _ in range(20_000))
    yield "a" * 100_000
    yield " " * 10_000 + "\n" * 10_000 + "\r\n" * 1000
    yield "!" * 10_000 + "7" * 10_000 + "\u4e2d" * 10_000
    yield f"x{EOT}y <|endoftext|"
    yield "\x00\x01\ufeff e\u0301 \u2581 \U0001f469\u200d\U0001f4bb"


def test_round_trip_is_exact(trained):
    for text in nasty_texts():
        assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pattern", [None, r"\S+|\s+"])
@pytest.mark.parametrize("max_piece_bytes", [16, 100, 256])
def test_pieces_are_bounded(texts, pattern, max_piece_bytes):
    spec = Bpe(vocab_size=300, pattern=pattern, max_piece_bytes=max_piece_bytes)
    tokenizer = train_bpe(texts[:20], spec)
    for text in nasty_texts():
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert sum(map(len, pieces)) == len(text.encode())
        assert max(map(len, pieces)) <= max_piece_bytes


def test_a_long_line_gives_no_long_tokens():
    line = "".join(random.Random(0).choices("ab", k=300)) * 2000
    tokenizer = train_bpe([line], Bpe(vocab_size=2000, max_piece_bytes=64))
    assert max(map(len, tokenizer.get_vocab())) <= 64


def test_split_pattern_is_the_published_one_for_short_pieces(trained):
    text = "I'll see 12345 naïve  caf\u00e9s...\n\n  x_y = (a + b)\t# done!?\r\n"
    pieces = [text[a:b] for _, (a, b) in trained.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["I", "'ll", " see", " ", "123", "45", " naïve", " ", " caf\u00e9s", "...\n\n", " "]
    expected += [" x", "_y", " =", " (", "a", " +", " b", ")", "\t", "#", " done", "!?\r\n"]
    assert pieces == expected
    assert "{1,63}" in split_pattern(64)


def test_ids(trained):
    assert trained.token_to_id(EOT) == 0
    assert vocab_span(trained) == trained.get_vocab_size() == 320
    spec = Bpe(vocab_size=300, special_tokens=[EOT, "<|pad|>"])
    assert train_bpe(["some text"], spec).token_to_id("<|pad|>") == 1


def test_special_tokens_in_text_are_text(tmp_path, trained):
    trained.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path).encode(f"a{EOT}b").ids
    assert 0 not in ids


def test_training_is_repeatable_whatever_the_order(texts):
    spec = Bpe(vocab_size=320)
    assert spec.build(texts) == spec.build(list(reversed(texts)))


def test_a_sample_too_small_for_the_vocabulary_is_said(texts, caplog):
    content = Bpe(vocab_size=5000).build(texts)
    size = vocab_span(Tokenizer.from_str(content.decode()))
    assert size < 5000
    assert f"merges for {size} tokens only, vocab_size=5000" in caplog.text


def test_min_frequency(texts):
    rare = train_bpe(["seldom"], Bpe(vocab_size=300, min_frequency=2))
    assert vocab_span(rare) == 257
    assert vocab_span(train_bpe(["seldom"], Bpe(vocab_size=300, min_frequency=1))) > 257


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_size": 256}, ["vocab_size=256", "at least 257", "tokenizer.vocab_size"]),
        ({"special_tokens": ["<s>"]}, ["special_tokens=['<s>']", EOT, "first"]),
        ({"special_tokens": []}, ["special_tokens=[]", EOT]),
        ({"min_frequency": 0}, ["min_frequency=0", "at least 1"]),
        ({"sample_bytes": 0}, ["sample_bytes=0", "at least 1"]),
        ({"max_piece_bytes": 8}, ["max_piece_bytes=8", "at least 16"]),
    ],
)
def test_bad_settings(message, changes, parts):
    with message("tokenizer=bpe", *parts):
        Bpe(**{"vocab_size": 400, **changes})


def test_nothing_to_train_on(message):
    with message("tokenizer=bpe", "sample", "empty", "check the sources"):
        train_bpe([""], Bpe(vocab_size=300))


def test_transformers_loads_a_corpus(tmp_path, make_corpus, texts):
    make_corpus()
    ours = load_tokenizer(tmp_path / "corpus")
    for theirs in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "corpus"),
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "corpus/tokenizer.json")
        ),
    ):
        for text in texts[:20]:
            ids = theirs.encode(text, add_special_tokens=False)
            assert ids == ours.encode(text).ids
            assert theirs.decode(ids) == text
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "corpus")
    assert (auto.eos_token, auto.eos_token_id, len(auto)) == (EOT, 0, 300)


def test_token_bytes_add_up(trained):
    lengths_O = token_bytes(trained)
    assert lengths_O.dtype == np.int32
    assert lengths_O[0] == 0
    assert (lengths_O[1:] > 0).all()
    for text in nasty_texts():
        assert lengths_O[trained.encode(text).ids].sum() == len(text.encode())


def test_token_bytes_of_added_tokens(trained):
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.add_tokens(["h\u00e9 llo"])
    tokenizer.add_special_tokens(["<|x|>"])
    assert token_bytes(tokenizer)[-2:].tolist() == [7, 0]


@pytest.fixture
def fallback(tmp_path):
    """A small tokenizer of SentencePiece's kind: blanks as U+2581, bytes as <0x..>."""
    vocab = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u00e9"]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(vocab)}, merges=[], byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer


def test_token_bytes_with_byte_fallback(fallback):
    text = "a b\u00e9 \u4e2d"
    assert token_bytes(fallback)[fallback.encode(text).ids].sum() == len(text.encode())
    assert not is_plain_byte_level(fallback)


def test_token_bytes_of_others(message):
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with message("WordPiece", "expected ByteLevel or ByteFallback"):
        token_bytes(tokenizer)
    tokenizer = Tokenizer(models.BPE(vocab={"a b": 0}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    with message("'a b'", "byte alphabet"):
        token_bytes(tokenizer)


def test_plain_byte_level(trained):
    assert is_plain_byte_level(trained)
    prefixed = Tokenizer.from_str(trained.to_str())
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not is_plain_byte_level(prefixed)


def test_existing(tmp_path, trained, fallback, message):
    assert Existing(path=str(tmp_path)).document_token(fallback) == "</s>"
    spec = Existing(path=str(tmp_path / "tokenizer.json"))
    assert spec.build(()) == (tmp_path / "tokenizer.json").read_bytes()
    assert spec.describe() == Existing(path=str(tmp_path)).describe()
    with message("tokenizer=existing", str(tmp_path), "['<eot>']", "set tokenizer.eot"):
        Existing(path=str(tmp_path), eot="<eot>").describe()


def test_existing_ignores_its_truncation_and_padding(tmp_path, trained):
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "rows of tokens and documents apart"
    assert load_tokenizer(tmp_path).encode(text).ids == trained.encode(text).ids


def test_existing_missing_or_damaged(tmp_path, message):
    with message("cannot read", "tokenizer.json", "save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with message("tokenizer.json", "not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with message("tokenizer.json", "not a tokenizer"):
        load_tokenizer(tmp_path)
