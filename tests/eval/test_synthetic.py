"""The synthetic tasks against brute force: dictionaries and permutations applied one by one."""

import itertools

import pytest
import torch
from llmtrain_eval import synthetic
from llmtrain_eval.synthetic import NOISE, group, recall, running_products, state_tracking

VOCAB = 512


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("tokens", "pairs"), [(4, 1), (64, 4), (128, 32), (256, 64), (65, 7)])
def test_every_answer_is_the_value_told_for_the_key(tokens, pairs):
    rows = 20
    examples = recall(rows, tokens, pairs, vocab_size=VOCAB, generator=seeded())
    assert examples.tokens_BT.shape == (rows, tokens)
    assert examples.asked.shape == examples.answers.shape == (rows, pairs)
    for row, asked, answers in zip(*(tensor.tolist() for tensor in examples)):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]))
        assert len(told) == pairs
        assert [told[row[position]] for position in asked] == answers
        assert asked == sorted(asked)
        assert {row[position] for position in asked} == set(told)
        rest = set(range(2 * pairs, tokens)) - set(asked)
        assert all(row[position] < NOISE for position in rest)
        assert all(position % 2 == 0 and position >= 2 * pairs for position in asked)


def test_targets_have_weight_at_the_questions_only():
    examples = recall(5, 64, 4, vocab_size=VOCAB, generator=seeded())
    targets_BT, weights_BT = examples.targets()
    assert weights_BT.sum() == 20
    assert targets_BT[weights_BT > 0].equal(examples.answers.flatten())
    keys = examples.tokens_BT[weights_BT > 0]
    assert ((keys >= NOISE) & (keys < NOISE + (VOCAB - NOISE) // 2)).all()


def test_queries_follow_the_power_law():
    """One query among 8 slots: slot j is drawn with probability ~ (j + 1)^(power - 1)."""
    rows, power = 40_000, -1.0
    examples = recall(rows, 18, 1, vocab_size=VOCAB, power=power, generator=seeded())
    counts = torch.bincount((examples.asked[:, 0] - 2) // 2, minlength=8) / rows
    expected = torch.arange(1.0, 9.0) ** (power - 1)
    torch.testing.assert_close(counts, expected / expected.sum(), atol=0.01, rtol=0)


def test_order_of_queries_is_not_the_order_of_pairs():
    examples = recall(2000, 64, 8, vocab_size=VOCAB, generator=seeded())
    first = examples.tokens_BT.gather(1, examples.asked[:, :1])
    place = (examples.tokens_BT[:, 0:16:2] == first).long().argmax(dim=1)
    counts = torch.bincount(place, minlength=8) / 2000
    torch.testing.assert_close(counts, torch.full((8,), 1 / 8), atol=0.03, rtol=0)


@pytest.mark.parametrize("name", synthetic.GROUPS)
def test_tables_are_groups(name):
    chosen = group(name)
    product, n = chosen.product, chosen.order
    assert n == {"parity": 2, "s3": 6, "a5": 60, "s5": 120, "s5_swaps": 120}[name]
    every = torch.arange(n)
    assert product[0].equal(every)
    assert product[:, 0].equal(every)
    assert all(row.sort().values.equal(every) for row in (*product, *product.T))
    draw = torch.randint(n, (3, 300), generator=seeded())
    a, b, c = draw
    assert product[product[a, b], c].equal(product[a, product[b, c]])
    commutes = product.equal(product.T)
    assert commutes == (name == "parity")


def apply_all(elements, word):
    """The product of a word by moving points: the last factor acts first."""
    points = list(range(len(elements[0])))
    for element in reversed(word):
        points = [elements[element][point] for point in points]
    return points


@pytest.mark.parametrize("name", synthetic.GROUPS)
def test_products_move_points_as_the_word_does(name):
    chosen = group(name)
    examples = state_tracking(4, 14, name, generator=seeded())
    for (first, *word), answers in zip(examples.tokens_BT.tolist(), examples.answers.tolist()):
        assert first == chosen.order
        assert set(word) <= set(chosen.letters.tolist())
        for t, answer in enumerate(answers):
            assert apply_all(chosen.elements, word[: t + 1]) == list(chosen.elements[answer])
    assert examples.asked.equal(torch.arange(1, 14).expand(4, 13))


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 100])
def test_doubling_is_the_loop(tokens):
    chosen = group("s5")
    tokens_BT = torch.randint(120, (3, tokens), generator=seeded())
    y_BT = running_products(tokens_BT, chosen.product)
    for row, answers in zip(tokens_BT.tolist(), y_BT.tolist()):
        loop = itertools.accumulate(row, lambda a, b: int(chosen.product[a, b]))
        assert list(loop) == answers


def test_swaps_reach_the_whole_group():
    examples = state_tracking(400, 60, "s5_swaps", generator=seeded())
    assert len(group("s5_swaps").letters) == 11
    assert len(examples.answers[:, -1].unique()) > 110


def test_parity_is_the_parity_of_ones():
    examples = state_tracking(3, 50, "parity", generator=seeded())
    assert examples.answers.equal(examples.tokens_BT[:, 1:].cumsum(dim=1) % 2)


def test_the_seed_decides():
    def draw(seed):
        first = recall(3, 64, 4, vocab_size=VOCAB, generator=seeded(seed))
        return [*first, *state_tracking(3, 20, "s3", generator=seeded(seed))]

    assert all(x.equal(y) for x, y in zip(draw(1), draw(1)))
    assert not draw(1)[0].equal(draw(2)[0])
    assert not draw(1)[3].equal(draw(2)[3])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"17 pairs for rows of 64 tokens, expected 1 to 16"):
        recall(1, 64, 17, vocab_size=VOCAB, generator=seeded())
    with pytest.raises(ValueError, match=r"vocab_size=80, expected at least 96"):
        recall(1, 64, 16, vocab_size=80, generator=seeded())
    with pytest.raises(ValueError, match=r"'s4', expected one of parity"):
        group("s4")
    with pytest.raises(ValueError, match=r"rows of 1 tokens, expected at least 2"):
        state_tracking(1, 1, "s3", generator=seeded())


def test_accuracy():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert synthetic.accuracy(logits, torch.tensor([1, 2])).tolist() == [1.0, 0.0]
