"""Scores are those of one plain forward pass per request, whatever is shared and batched."""

import numpy as np
import pytest
import torch
from llmtrain_eval import scoring

from llmtrain.context import SequenceContext

CONTEXT = [0, 5, 9, 31, 7, 8, 5, 9, 40, 41]
LONG = [0, *(int(t) for t in torch.randint(300, (50,), generator=torch.Generator().manual_seed(3)))]
REQUESTS = [
    (CONTEXT, [3]),
    (CONTEXT, [4]),
    (CONTEXT, [5, 6, 7]),
    (CONTEXT[:4], [31, 7]),
    (LONG, [8]),
    (LONG, [9]),
    (LONG, [1, 2, 3, 4]),
    (LONG, [1, 2]),
    (LONG[:33], [7, 7]),
    ([0], [2]),
    (LONG, list(range(20, 60))),
    (CONTEXT, [3]),
]


def plain(model, context, continuation, max_length):
    """(log p, greedy) by one row, float64 log-softmax over the whole row."""
    row = [*context, *continuation][-(max_length + 1) :]
    tokens = torch.tensor([row[:-1]])
    with torch.no_grad():
        out = model(tokens, SequenceContext.dense(1, tokens.shape[1])).hidden_BTD
        logits = model.logits(out)[0, -len(continuation) :].double()
    targets = torch.tensor(continuation)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(log_p), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("max_length", [64, 40])
@pytest.mark.parametrize("batch_tokens", [1, 70, 100_000])
@pytest.mark.parametrize("mixer", ["attention", "sliding_window"])
def test_scores(small_model, monkeypatch, max_length, batch_tokens, mixer):
    window = ("mixer.window=16",) if mixer == "sliding_window" else ()
    model = small_model(*window, mixer=mixer, dtype=torch.float64)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * model.vocab_size)
    got = scoring.score(model, REQUESTS, max_length=max_length, batch_tokens=batch_tokens)
    for (context, continuation), (log_p, greedy) in zip(REQUESTS, got, strict=True):
        expected = plain(model, context, continuation, max_length)
        assert log_p == pytest.approx(expected[0], abs=1e-9)
        assert greedy == expected[1]
        assert isinstance(greedy, bool)


def test_greedy_continuations_are_recognised(small_model):
    model = small_model(dtype=torch.float64)
    row = list(CONTEXT)
    for _ in range(3):
        hidden = model(torch.tensor([row]), SequenceContext.dense(1, len(row))).hidden_BTD
        row.append(int(model.logits(hidden)[0, -1].argmax()))
    answers = row[len(CONTEXT) :]
    wrong = [*answers[:2], (answers[2] + 1) % 300]
    got = scoring.score(
        model, [(CONTEXT, answers), (CONTEXT, wrong)], max_length=64, batch_tokens=100
    )
    assert [greedy for _, greedy in got] == [True, False]


def test_forward_passes_are_shared(small_model):
    """Four answers of one token: one row. A long context with four answers: read once."""
    model = small_model()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    requests = [(CONTEXT, [token]) for token in (3, 4, 5, 6)]
    scoring.score(model, requests, max_length=64, batch_tokens=1000)
    assert seen == [(1, len(CONTEXT))]
    seen.clear()
    requests = [(LONG, [token, 7]) for token in (3, 4, 5, 6)]
    scoring.score(model, requests, max_length=64, batch_tokens=1000)
    # the last context token is read again, with the answers: its logits are needed
    assert seen == [(1, len(LONG) - 1), (4, 2)]


def test_batches_hold_at_most_batch_tokens(small_model):
    model = small_model()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
    requests = [([0, *range(1, n)], [n, n + 1]) for n in range(3, 30)]
    scoring.score(model, requests, max_length=64, batch_tokens=90)
    assert max(seen) <= 90
    assert len(seen) < len(requests) / 2


def test_bfloat16_activations_give_float32_probabilities(small_model):
    """In bfloat16 itself the log-probabilities of a row could not sum to one within 1e-3."""
    model = small_model(dtype=torch.bfloat16)
    hidden_D = model(torch.tensor([CONTEXT]), SequenceContext.dense(1, 10)).hidden_BTD[0, -1]
    every_O = torch.arange(model.vocab_size)
    log_p_O, _ = scoring.log_probabilities(model, hidden_D.expand(len(every_O), -1), every_O)
    assert np.exp(log_p_O).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "numbers"),
    [(([], [1]), "0 context and 1"), (([1], []), "1 context and 0"), (([1], [2] * 65), "65")],
)
def test_requests_that_cannot_be_scored(small_model, request_, numbers):
    with pytest.raises(ValueError, match=f"request 1 has .*{numbers}.*expected .* 1 to 64"):
        scoring.score(small_model(), [(CONTEXT, [1]), request_], max_length=64, batch_tokens=90)
