"""Log-likelihoods of token continuations, in few and large forward passes.

    row:  context tokens | continuation tokens without the last     logits of the last positions

Three savings, none of which changes a result beyond rounding: rows are sorted by length and cut
into batches of about equal cost, padded on the right (exact for causal models); continuations that
need the same row (one token each, same context) share it; continuations of one long context share
its state, so that the context is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel, ModelState
from llmtrain_eval import ranks

T = TypeVar("T")
Request = tuple[Sequence[int], Sequence[int]]  # context tokens, continuation tokens
Score = tuple[float, bool]  # log p(continuation | context), would greedy decoding yield it

LOGITS_AT_ONCE = 2**26  # elements; bounds the memory of the head
# Contexts of at least so many tokens are read once for all their continuations. They are alone in
# their forward pass then, which a GPU only fills when they are long.
SHARED_CONTEXT = {"cpu": 32, "cuda": 2048}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input row and what is scored at its end: (index of a request, its continuation)."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """Number of positions at the end of the row whose logits are needed."""
        return max(len(continuation) for _, continuation in self.requests)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens before those positions."""
        return self.tokens[: -self.scored]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows for one forward pass; if prefix > 0 their first `prefix` tokens are the same."""

    rows: list[Row]
    prefix: int = 0


def score(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_tokens: int,
    done: Callable[[int], object] = lambda requests: None,
) -> list[Score]:
    """Score of every request, the same on all ranks. Contexts that do not fit lose their start.

    max_length: tokens of a row, at most. done: called with the number of requests finished.
    ValueError for an empty context or continuation, and a continuation longer than max_length.
    """
    shortest = SHARED_CONTEXT[model.embedding.weight.device.type]
    batches = make_batches(make_rows(requests, max_length), batch_tokens, shortest)
    part: dict[int, Score] = {}
    for batch in ranks.share(batches):
        part |= score_batch(model, batch, batch_tokens)
        done(ranks.world_size() * sum(len(row.requests) for row in batch.rows))
    results = {index: scored for one in ranks.gather(part) for index, scored in one.items()}
    return [results[index] for index in range(len(requests))]


def make_rows(requests: Sequence[Request], max_length: int) -> list[Row]:
    """The distinct rows that the requests need."""
    rows: dict[tuple[int, ...], Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"eval: request {index} has {len(context)} context and {len(continuation)} "
                f"continuation tokens, expected at least 1 and 1 to {max_length}; "
                "mend the task's texts, or raise max_length"
            )
        tokens = (*context, *continuation)[-(max_length + 1) : -1]
        rows.setdefault(tokens, Row(tokens=tokens)).requests.append((index, continuation))
    return list(rows.values())


def make_batches(rows: Sequence[Row], batch_tokens: int, shortest: int) -> list[Batch]:
    """Rows that share a context of at least `shortest` tokens, and rows of about equal length.

    The longest come first: memory runs out at the start or never.
    """
    families = defaultdict(list)
    for row in rows:
        families[row.context].append(row)
    single, batches = [], []
    for context, family in families.items():
        if len(family) > 1 and len(context) >= shortest:
            batches.append(Batch(rows=family, prefix=len(context)))
        else:
            single.extend(family)
    batches += [Batch(rows=part) for part in cut(single, batch_tokens, lambda r: len(r.tokens))]
    return sorted(batches, key=lambda batch: -len(batch.rows[0].tokens))


def cut(items: Sequence[T], batch_tokens: int, length: Callable[[T], int]) -> list[list[T]]:
    """Items by falling length, in batches of at most batch_tokens tokens once padded."""
    ordered = sorted(items, key=length, reverse=True)
    batches = []
    while ordered:
        size = max(1, batch_tokens // length(ordered[0]))
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


@torch.inference_mode()
def score_batch(model: LanguageModel, batch: Batch, batch_tokens: int) -> dict[int, Score]:
    """Request index -> score."""
    if batch.prefix == 0:
        return score_tails(model, batch.rows)
    device = model.embedding.weight.device
    longest = max(len(row.tokens) for row in batch.rows)
    ctx = SequenceContext.dense(1, batch.prefix, device=device)
    tokens_BT = torch.tensor([batch.rows[0].context], device=device)
    state = model(tokens_BT, ctx, model.init_state(1, longest)).state
    results: dict[int, Score] = {}
    for rows in cut(batch.rows, batch_tokens, lambda row: len(row.tokens)):
        index_B = torch.zeros(len(rows), dtype=torch.int64, device=device)
        results |= score_tails(model, rows, batch.prefix, state.select(index_B))
    return results


def score_tails(
    model: LanguageModel, rows: Sequence[Row], prefix: int = 0, state: ModelState | None = None
) -> dict[int, Score]:
    """Request index -> score, by one forward pass over the rows' tokens from `prefix` on."""
    device = model.embedding.weight.device
    lengths = [len(row.tokens) - prefix for row in rows]
    tokens_BT = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens_BT[b, : lengths[b]] = torch.tensor(row.tokens[prefix:])
    ctx = SequenceContext.dense(*tokens_BT.shape, device=device, prefix_tokens=prefix)
    hidden_BTD = model(tokens_BT.to(device), ctx, state).hidden_BTD

    entries = [
        (index, b, lengths[b] - len(continuation) + i, token)
        for b, row in enumerate(rows)
        for index, continuation in row.requests
        for i, token in enumerate(continuation)
    ]
    index_N, row_N, position_N, token_N = torch.tensor(entries).T
    log_p_N, greedy_N = log_probabilities(
        model, hidden_BTD[row_N.to(device), position_N.to(device)], token_N.to(device)
    )
    index_N = index_N.numpy()
    totals = np.bincount(index_N, weights=log_p_N)
    missed = np.bincount(index_N, weights=~greedy_N)
    return {i: (float(totals[i]), bool(missed[i] == 0)) for i in np.unique(index_N).tolist()}


@torch.inference_mode()
def log_probabilities(
    model: LanguageModel, hidden_ND: Tensor, token_N: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """log p of each token after what its hidden vector has read, and: is it the likeliest one.

    Log-softmax runs in float32 (float64 for float64 models). The head runs on pieces of bounded
    size. Returns float64 [N] and bool [N].
    """
    log_p, greedy = [], []
    step = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for hidden_CD, token_C in zip(hidden_ND.split(step), token_N.split(step)):
        logits_CO = model.logits(hidden_CD)
        logits_CO = logits_CO.to(torch.promote_types(logits_CO.dtype, torch.float32))
        chosen_C = logits_CO.gather(1, token_C[:, None]).squeeze(1)
        log_p.append(chosen_C - logits_CO.logsumexp(dim=-1))
        greedy.append(logits_CO.argmax(dim=-1) == token_C)
    return torch.cat(log_p).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()
