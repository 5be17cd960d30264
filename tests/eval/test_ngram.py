"""n-gram baselines against a dictionary implementation, and the properties they promise."""

import itertools
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from llmtrain_eval.ngram import ABSENT, NAMES, Baselines, Events, discounts

from llmtrain.data.loader import Batch, TokenLoader

V = 7


def rows(tokens_BT, starts=()):
    """A batch of whole rows; starts: (row, position) of documents."""
    tokens_BT = torch.as_tensor(tokens_BT)
    starts_BT = torch.zeros(tokens_BT[:, 1:].shape, dtype=torch.bool)
    for place in starts:
        starts_BT[place] = True
    return Batch(
        tokens_BT=tokens_BT[:, :-1],
        targets_BT=tokens_BT[:, 1:],
        weights_BT=torch.ones(starts_BT.shape),
        doc_starts_BT=starts_BT,
    )


def random_rows(seed=0, shape=(12, 30)):
    """Rows with structure: the next token is often the sum of the two before."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, V - 1, shape)  # token V - 1 never occurs
    for t in range(2, shape[1]):
        follow = draw.random(shape[0]) < 0.6
        tokens[follow, t] = ((tokens[:, t - 1] + tokens[:, t - 2]) % (V - 1))[follow]
    return tokens


class Slow:
    """Interpolated Kneser-Ney by dictionaries, one token at a time."""

    def __init__(self, grams):
        self.order = len(grams[0])
        self.count = Counter(grams)
        self.discount = discounts(np.array(sorted(self.count.values())))
        self.following = defaultdict(dict)
        for gram, count in self.count.items():
            self.following[gram[:-1]][gram[-1]] = count
        # one for each distinct left neighbour
        self.lower = Slow([gram[1:] for gram in self.count]) if self.order > 1 else None

    def p(self, context, token):
        lower = self.lower.p(context[1:], token) if self.lower else 1 / V
        after = self.following.get(context)
        if not after:
            return lower
        minus = {t: self.discount[min(n, 3) - 1] for t, n in after.items()}
        total = sum(after.values())
        share = max(after.get(token, 0) - minus.get(token, 0), 0) / total
        return share + sum(minus.values()) / total * lower


def test_against_the_slow_way():
    tokens = random_rows()
    baselines = Baselines(Events.of(rows(tokens), mask_documents=True), V)
    grams = {
        n: [
            tuple(row[t - n + 1 : t + 1])
            for row in tokens.tolist()
            # the first token of a row is no target, the second has one token before it
            for t in range(max(1, n - 1), len(row))
        ]
        for n in (1, 2, 3)
    }
    slow = {n: Slow(grams[n]) for n in grams}
    other = random_rows(seed=1, shape=(5, 11))
    got = baselines.probabilities(Events.of(rows(other), mask_documents=True))
    expected = []
    for row in other.tolist():
        for t in range(1, len(row)):
            bigram = slow[2].p((row[t - 1],), row[t])
            trigram = slow[3].p((row[t - 2], row[t - 1]), row[t]) if t > 1 else bigram
            expected.append((slow[1].p((), row[t]), bigram, trigram))
    np.testing.assert_allclose(got, np.array(expected).T, rtol=1e-12)


@pytest.mark.parametrize("tokens", [random_rows(), random_rows()[:1, :4], np.zeros((2, 9), int)])
def test_probabilities_sum_to_one(tokens):
    """After every context, seen or not, also where counts of counts are missing."""
    baselines = Baselines(Events.of(rows(tokens), mask_documents=False), V)
    contexts = list(itertools.product([ABSENT, *range(V)], range(V)))
    before, last, target = np.array([(a, b, c) for a, b in contexts for c in range(V)]).T
    events = Events(target_N=target, last_N=last, before_N=before)
    p_ONC = baselines.probabilities(events).reshape(3, len(contexts), V)
    assert (p_ONC > 0).all()
    np.testing.assert_allclose(p_ONC.sum(axis=2), 1, rtol=1e-12)


def test_contexts_end_at_rows_and_documents():
    batch = rows([[3, 4, 5, 6, 1], [0, 2, 2, 0, 3]], starts=[(1, 0), (1, 3)])
    events = Events.of(batch, mask_documents=True)
    assert events.target_N.tolist() == [4, 5, 6, 1, 2, 2, 0, 3]
    assert events.last_N.tolist() == [3, 4, 5, 6, 0, 2, 2, 0]
    # the document that begins at position 3 of the second row has nothing before its first token
    assert events.before_N.tolist() == [-1, 3, 4, 5, -1, 0, 2, -1]
    unmasked = Events.of(batch, mask_documents=False)
    assert unmasked.before_N.tolist() == [-1, 3, 4, 5, -1, 0, 2, 2]


def test_tokens_without_weight_are_neither_counted_nor_scored():
    tokens = random_rows()
    batch = rows(tokens)
    batch.weights_BT[:, 20:] = 0
    cut = rows(tokens[:, :21])
    one, other = (Baselines(Events.of(b, mask_documents=True), V) for b in (batch, cut))
    assert one.bits([batch], mask_documents=True) == other.bits([cut], mask_documents=True)


def test_longer_contexts_help_where_there_is_structure():
    train, held_out = random_rows(shape=(60, 80)), random_rows(seed=5, shape=(20, 80))
    baselines = Baselines(Events.of(rows(train), mask_documents=True), V)
    bits = baselines.bits([rows(held_out)], mask_documents=True)
    tokens = held_out[:, 1:].size
    assert bits["unigram"] / tokens > 2.5
    assert bits["trigram"] < 0.8 * bits["bigram"]
    # 60 % of the tokens are determined, the others are uniform over six
    p = 0.6 + 0.4 / 6
    entropy = -p * np.log2(p) - 5 * (0.4 / 6) * np.log2(0.4 / 6)
    assert entropy * 0.97 < bits["trigram"] / tokens < entropy * 1.1
    assert tuple(bits) == NAMES


def test_counting_reads_what_training_reads(corpus):
    """The first samples of the loader's order, at most one epoch of them."""
    loader = TokenLoader.open(corpus, "train", seq_len=32, seed=3)
    held_out = loader.batch(0, 4)
    few = Baselines.counted(loader, samples=40, mask_documents=True)
    same = Baselines(Events.of(loader.batch(0, 40), mask_documents=True), loader.vocab_size)
    bits = few.bits([held_out], mask_documents=True)
    assert bits == same.bits([held_out], mask_documents=True)
    epoch = loader.rows_per_epoch
    all_of_it = Baselines.counted(loader, samples=epoch, mask_documents=True)
    more = Baselines.counted(loader, samples=10 * epoch, mask_documents=True)
    bits = all_of_it.bits([held_out], mask_documents=True)
    assert bits == more.bits([held_out], mask_documents=True)


def test_impossible_counts():
    events = Events.of(rows(random_rows()), mask_documents=True)
    with pytest.raises(ValueError, match=r"ngram: got a vocabulary of 2097152 .* at most 2097151"):
        Baselines(events, 2097152)
    nothing = Events(**{name: np.zeros(0, np.int64) for name in vars(events)})
    with pytest.raises(ValueError, match=r"ngram: got no training tokens, .*number of rows"):
        Baselines(nothing, V)


@pytest.mark.slow
def test_twenty_million_tokens_take_less_than_a_minute():
    draw = np.random.default_rng(0)
    tokens = (draw.zipf(1.2, (21_000_000 // 513, 513)) % 4096).astype(np.int64)
    follow = draw.random(tokens[:, 1:].shape) < 0.6
    tokens[:, 1:][follow] = ((tokens[:, :-1] * 31 + 7) % 4096)[follow]
    torch.set_num_threads(1)
    batch = rows(tokens)
    began = time.process_time()
    baselines = Baselines(Events.of(batch, mask_documents=True), 4096)
    baselines.bits([rows(tokens[: 1_000_000 // 513])], mask_documents=True)
    assert time.process_time() - began < 60
