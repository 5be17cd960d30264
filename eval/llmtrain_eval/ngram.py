"""Counting baselines: what unigrams, bigrams and trigrams know about the same tokens.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3, equations 23-26): with n the
count of token c after context h,

    p(c | h) = (n(hc) - D(n(hc))) / n(h) + gamma(h) p(c | h'),   gamma(h) = sum_c D(n(hc)) / n(h)

h' is h without its oldest token; the lowest order backs off to the uniform distribution. The
highest order uses counts of tokens, the lower ones count distinct left neighbours. The discounts
D1, D2, D3 come in closed form from the training tokens' counts of counts, so nothing is fitted on
held-out data. Every distribution sums to one over the vocabulary.

A token is predicted from what the model may see: contexts never reach over the start of a row, nor
(when documents are masked) over the start of a document; where the older token is missing, the
shorter model predicts. Cost: one sort of the training tokens' keys for each order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llmtrain.data.loader import Batch, TokenLoader

log = logging.getLogger(__name__)

NAMES = ("unigram", "bigram", "trigram")
ROWS_AT_ONCE = 256
ABSENT = -1  # in place of a context token that the row or document does not have


@dataclass(frozen=True, kw_only=True)
class Events:
    """Predicted tokens and the two tokens before each, oldest first; ABSENT where there is none.

    target_N, last_N, before_N: int64 [N].
    """

    target_N: np.ndarray
    last_N: np.ndarray
    before_N: np.ndarray

    @classmethod
    def of(cls, batch: Batch, *, mask_documents: bool) -> Events:
        """The predictions of a batch that have a weight."""
        tokens_BT = batch.tokens_BT.numpy().astype(np.int64)
        before_BT = np.full_like(tokens_BT, ABSENT)
        before_BT[:, 1:] = tokens_BT[:, :-1]
        if mask_documents:
            before_BT[batch.doc_starts_BT.numpy()] = ABSENT
        scored_BT = batch.weights_BT.numpy() > 0
        return cls(
            target_N=batch.targets_BT.numpy()[scored_BT].astype(np.int64),
            last_N=tokens_BT[scored_BT],
            before_N=before_BT[scored_BT],
        )


def run_lengths(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and how often each occurs. Sorts keys_N in place."""
    keys_N.sort()
    starts = np.flatnonzero(np.diff(keys_N, prepend=keys_N[:1] - 1))
    return keys_N[starts], np.diff(starts, append=keys_N.size)


def discounts(counts_N: np.ndarray) -> np.ndarray:
    """D1, D2 and D3 (for counts of three and more) from the counts of counts, float64 [3].

    Where a count of counts is zero the closed form does not exist: then one discount for all, of
    plain Kneser-Ney, n1 / (n1 + 2 n2), or 0.5 if there is no count of one either.
    """
    n1, n2, n3, n4 = (int((counts_N == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return np.full(3, n1 / (n1 + 2 * n2) if n1 and n2 else 0.5)
    y = n1 / (n1 + 2 * n2)
    closed = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(closed, 0.01, np.array([0.99, 1.99, 2.99]))


class Level:
    """One order of the recursion: discounted counts and back-off weights, looked up by key.

    keys_N: sorted int64 keys, context * vocab_size + token. counts_N: their counts.
    """

    def __init__(self, keys_N: np.ndarray, counts_N: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        discount_N = discounts(counts_N)[np.minimum(counts_N, 3) - 1]
        contexts_N = keys_N // vocab_size
        starts = np.flatnonzero(np.diff(contexts_N, prepend=contexts_N[:1] - 1))
        totals = np.add.reduceat(counts_N, starts)
        sizes = np.diff(starts, append=keys_N.size)
        self.keys_N = keys_N
        self.share_N = (counts_N - discount_N) / np.repeat(totals, sizes)
        self.contexts = contexts_N[starts]
        self.backoff = np.add.reduceat(discount_N, starts) / totals

    def probabilities(
        self, context_N: np.ndarray, target_N: np.ndarray, lower_N: np.ndarray
    ) -> np.ndarray:
        """p(target | context), given that of the shorter context, lower_N; float64 [N]."""
        share_N = look_up(self.keys_N, self.share_N, context_N * self.vocab_size + target_N, 0.0)
        backoff_N = look_up(self.contexts, self.backoff, context_N, 1.0)
        return share_N + backoff_N * lower_N


def look_up(keys: np.ndarray, values: np.ndarray, query_N: np.ndarray, missing: float):
    """values at the places of query_N in the sorted keys; missing where it is not among them."""
    place_N = np.minimum(np.searchsorted(keys, query_N), keys.size - 1)
    return np.where(keys[place_N] == query_N, values[place_N], missing)


class Ngram:
    """A model of one order (1, 2 or 3) counted on events; lower orders are inside."""

    def __init__(self, events: Events, *, order: int, vocab_size: int):
        self.order = order
        self.vocab_size = vocab_size
        keys_N = events.target_N.copy()
        if order > 1:
            keys_N += events.last_N * vocab_size
        if order > 2:
            known_N = events.before_N != ABSENT
            keys_N = keys_N[known_N] + events.before_N[known_N] * vocab_size**2
        self.levels: list[Level] = []  # highest order first
        keys, counts = run_lengths(keys_N)
        while True:
            if keys.size:
                self.levels.append(Level(keys, counts, vocab_size))
            order -= 1
            if order == 0:
                return
            # of each distinct n-gram, the newest tokens: one count per distinct left neighbour
            keys, counts = run_lengths(keys % vocab_size**order)

    def probabilities(self, events: Events) -> np.ndarray:
        """p(target | contexts) of events that have all contexts of this order; float64 [N]."""
        contexts = [np.zeros_like(events.target_N)]
        if self.order > 1:
            contexts.append(events.last_N)
        if self.order > 2:
            contexts.append(events.before_N * self.vocab_size + events.last_N)
        p_N = np.full(events.target_N.size, 1 / self.vocab_size)
        for level, context_N in zip(reversed(self.levels), contexts):
            p_N = level.probabilities(context_N, events.target_N, p_N)
        return p_N


class Baselines:
    """Unigram, bigram and trigram models counted on the same events."""

    def __init__(self, events: Events, vocab_size: int):
        if vocab_size**3 >= 2**63:
            raise ValueError(
                f"ngram: got a vocabulary of {vocab_size} tokens, expected at most 2097151, so "
                "that a trigram fits a 64-bit key; leave the n-gram baselines out"
            )
        if events.target_N.size == 0:
            raise ValueError(
                "ngram: got no training tokens, expected at least one row; "
                "give the number of rows the model was trained on"
            )
        self.models = [Ngram(events, order=n, vocab_size=vocab_size) for n in (1, 2, 3)]

    @classmethod
    def counted(cls, loader: TokenLoader, *, samples: int, mask_documents: bool) -> Baselines:
        """Counted on the rows that training reads first: samples 0 .. samples - 1 of the loader.

        Rows of later epochs repeat the first one's. Counting them again would add no knowledge and
        spoil the discounts (no n-gram would occur once), so at most one epoch is counted.
        """
        samples = min(samples, loader.rows_per_epoch)
        log.info("n-grams: counting %d rows", samples)
        parts = [
            Events.of(
                loader.batch(first, min(ROWS_AT_ONCE, samples - first)),
                mask_documents=mask_documents,
            )
            for first in range(0, samples, ROWS_AT_ONCE)
        ]
        names = ("target_N", "last_N", "before_N")
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
        return cls(Events(**joined), loader.vocab_size)

    def probabilities(self, events: Events) -> np.ndarray:
        """p(target | context) of the unigram, bigram and trigram model; float64 [3, N].

        The trigram's row holds the bigram's number where the older context token is missing.
        """
        unigram_N, bigram_N, trigram_N = (model.probabilities(events) for model in self.models)
        trigram_N = np.where(events.before_N == ABSENT, bigram_N, trigram_N)
        return np.stack([unigram_N, bigram_N, trigram_N])

    def bits(self, batches: Iterable[Batch], *, mask_documents: bool) -> dict[str, float]:
        """Sum of -log2 p over every weighted token of the batches, by name of the model."""
        total = np.zeros(len(NAMES))
        for batch in batches:
            events = Events.of(batch, mask_documents=mask_documents)
            total -= np.log2(self.probabilities(events)).sum(axis=1)
        return dict(zip(NAMES, total.tolist()))
