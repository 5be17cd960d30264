"""Bits per byte: every held-out token once, by plain forward passes over its documents."""

import math

import numpy as np
import pytest
import torch
from llmtrain_data.manifest import Manifest, open_split
from llmtrain_data.tokenizer import token_bytes
from llmtrain_eval.bits_per_byte import bits_per_byte, held_out, of_ngrams
from llmtrain_eval.ngram import Baselines

from llmtrain.context import SequenceContext
from llmtrain.data.loader import TokenLoader


@pytest.fixture(scope="module")
def streams(corpus):
    """source -> (tokens, starts of documents) of the val split."""
    opened = open_split(corpus, Manifest.load(corpus), "val")
    return {
        name: (
            np.concatenate([shard.tokens for shard in shards]).astype(np.int64),
            {int(start) for shard in shards for start in shard.starts[:-1]},
        )
        for name, shards in opened.items()
    }


def slow_bits(model, tokens, starts, *, seq_len, stride, masked):
    """-log2 p of every token but the first, each from a forward pass over its own context."""
    total = 0.0
    for target in range(1, len(tokens)):
        row = max(0, math.ceil((target - seq_len) / stride))
        begin = row * stride
        if masked:
            begin = max(begin, *(start for start in starts if start < target), 0)
        context = torch.from_numpy(tokens[begin:target])[None]
        with torch.no_grad():
            ctx = SequenceContext.dense(1, context.shape[1])
            logits = model.logits(model(context, ctx).hidden_BTD[:, -1])
        total -= float(logits.double().log_softmax(-1)[0, tokens[target]]) / math.log(2)
    return total


def measured(model, corpus, tokenizer, *, masked=True, **options):
    sizes = torch.from_numpy(token_bytes(tokenizer)).long()
    rows = held_out(corpus, **options)
    return bits_per_byte(model, rows, sizes, mask_documents=masked, batch_tokens=200)


@pytest.mark.parametrize(("stride", "masked"), [(None, True), (24, False), (7, True)])
def test_against_the_slow_way(small_model, corpus, tokenizer, streams, stride, masked):
    model = small_model(dtype=torch.float64)
    got = measured(model, corpus, tokenizer, masked=masked, seq_len=64, stride=stride)
    assert set(got["sources"]) == set(streams)
    name, (tokens, starts) = min(streams.items(), key=lambda item: len(item[1][0]))
    expected = slow_bits(model, tokens, starts, seq_len=64, stride=stride or 64, masked=masked)
    source = got["sources"][name]
    assert source["bits"] == pytest.approx(expected, rel=1e-9)
    assert source["tokens"] == len(tokens) - 1
    assert got["tokens"] == sum(len(tokens) - 1 for tokens, _ in streams.values())
    assert got["bits"] == pytest.approx(sum(s["bits"] for s in got["sources"].values()))
    assert got["loss"] == pytest.approx(got["bits"] * math.log(2) / got["tokens"])


def test_bytes_are_those_of_the_text(small_model, corpus, tokenizer):
    manifest = Manifest.load(corpus)
    got = measured(small_model(), corpus, tokenizer, seq_len=64)
    for name, source in manifest.splits["val"].items():
        assert got["sources"][name]["bytes"] == source.bytes
    assert got["bits_per_byte"] == got["bits"] / sum(
        s.bytes for s in manifest.splits["val"].values()
    )


def test_rows_are_those_of_training(small_model, corpus, tokenizer):
    """The loader's rows, in its own order, cost the same."""
    model = small_model(dtype=torch.float64)
    got = measured(model, corpus, tokenizer, seq_len=64)
    loader = TokenLoader.open(corpus, "val", seq_len=64, seed=5)
    batch = loader.batch(0, loader.rows_per_epoch)
    with torch.no_grad():
        hidden = model(batch.tokens_BT, SequenceContext.packed(batch.doc_starts_BT)).hidden_BTD
        log_p = model.logits(hidden).log_softmax(-1).gather(-1, batch.targets_BT[..., None])[..., 0]
    assert got["loss"] * got["tokens"] == pytest.approx(-float((log_p * batch.weights_BT).sum()))


def test_fewer_tokens_are_spread_over_the_whole_split(corpus):
    everything = held_out(corpus, seq_len=16)
    some = held_out(corpus, seq_len=16, max_tokens=sum(s.scored_tokens() for s in everything) // 4)
    for whole, part in zip(everything, some, strict=True):
        assert abs(len(part.rows) - len(whole.rows) / 4) <= 1
        assert (part.rows[0], part.rows[-1]) == (0, whole.rows[-1])
        assert len(set(part.rows.tolist())) == len(part.rows)
        tokens = sum(
            int((part.batch(part.rows[i : i + 1]).weights_BT).sum()) for i in range(len(part.rows))
        )
        assert tokens == part.scored_tokens()


def test_ngrams_are_given_the_same_tokens(small_model, corpus, tokenizer):
    loader = TokenLoader.open(corpus, "train", seq_len=64, seed=0)
    baselines = Baselines.counted(loader, samples=loader.rows_per_epoch, mask_documents=True)
    model = measured(small_model(), corpus, tokenizer, seq_len=64)
    rows = held_out(corpus, seq_len=64)
    got = of_ngrams(baselines, rows, model, mask_documents=True)
    for result in got.values():
        assert (result["bytes"], result["tokens"]) == (model["bytes"], model["tokens"])
        total = sum(source["bits"] for source in result["sources"].values())
        assert result["bits"] == pytest.approx(total)
    held = TokenLoader.open(corpus, "val", seq_len=64, seed=1)
    bits = baselines.bits([held.batch(0, held.rows_per_epoch)], mask_documents=True)
    assert {name: r["bits"] for name, r in got.items()} == pytest.approx(bits)
    assert bits["bigram"] < bits["unigram"]


def test_strides_that_skip_tokens_are_refused(corpus):
    with pytest.raises(ValueError, match=r"bits_per_byte.stride: got 65, expected 1 to .* 64"):
        held_out(corpus, seq_len=64, stride=65)
    with pytest.raises(ValueError, match=r"no split 'test'"):
        held_out(corpus, seq_len=64, split="test")
