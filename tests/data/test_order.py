import numpy as np
import pytest

from llmtrain.data import order
from llmtrain.data.order import EpochOrder, WeightedOrder, check_weights

ROWS = [31, 8, 1, 3]
WEIGHTS = [0.5, 3, 0.25, 1.25]


def epochs(seed=0):
    return EpochOrder(ROWS, fingerprint="f", seed=seed)


def weighted(seed=0, weights=WEIGHTS, rows=ROWS):
    return WeightedOrder(rows, weights, fingerprint="f", seed=seed)


def pairs(order, first, count):
    return list(zip(*(part.tolist() for part in order.rows(first, count))))


@pytest.mark.parametrize("make", [epochs, weighted])
def test_pure_function_of_the_sample(make):
    whole = pairs(make(), 0, 400)
    for first, count in [(0, 1), (5, 100), (43, 43), (399, 1), (200, 199)]:
        assert pairs(make(), first, count) == whole[first : first + count]
    assert pairs(make(seed=1), 0, 400) != whole


def test_every_row_once_an_epoch():
    every = sorted((source, row) for source, rows in enumerate(ROWS) for row in range(rows))
    total = sum(ROWS)
    seen = [pairs(epochs(), epoch * total, total) for epoch in range(4)]
    for epoch in seen:
        assert sorted(epoch) == every
    assert len({tuple(epoch) for epoch in seen}) == 4


def test_each_source_has_epochs_of_its_own():
    drawn = pairs(weighted(), 0, 5000)
    for source, rows in enumerate(ROWS):
        own = [row for name, row in drawn if name == source]
        assert len(own) > 5 * rows
        for start in range(0, len(own) - rows, rows):
            assert sorted(own[start : start + rows]) == list(range(rows))


def test_sources_are_drawn_by_weight():
    count = 200_000
    sources_B = weighted().sources(0, count)
    share = np.bincount(sources_B) / count
    expected = np.array(WEIGHTS) / sum(WEIGHTS)
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(share - expected) < 5 * error).all()
    # Consecutive draws are independent: the frequency of a pair is the product.
    both = np.mean((sources_B[1:] == 1) & (sources_B[:-1] == 1))
    assert abs(both - expected[1] ** 2) < 5 * np.sqrt(expected[1] ** 2 / count)


def test_counts_across_blocks(monkeypatch):
    whole = weighted().sources(0, 1000)
    monkeypatch.setattr(order, "BLOCK", 64)
    mix = weighted()
    for sample in (1000, 0, 63, 64, 65, 640, 999):
        expected = np.bincount(whole[:sample], minlength=len(ROWS))
        assert mix.counts_before(sample).tolist() == expected.tolist()


def test_one_source_of_all_weight():
    assert set(weighted(weights=[2.0], rows=[9]).sources(0, 1000)) == {0}


def test_weights_in_the_order_of_the_sources():
    assert check_weights({"b": 1, "a": 0.5}, ["a", "b"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"a": 1, "b": 1, "x": 1}, ["unknown source 'x'", "the corpus has a, b", "remove it"]),
        ({"a": 1}, ["'b' has no weight", "never be read", "a, b"]),
        ({"a": 1, "b": 0}, ["data.weights.b=0", "above zero"]),
        ({"a": -1, "b": 1}, ["data.weights.a=-1", "above zero"]),
        ({"a": float("nan"), "b": 1}, ["data.weights.a=nan", "above zero"]),
        ({"a": float("inf"), "b": 1}, ["data.weights.a=inf", "above zero"]),
    ],
)
def test_bad_weights(message, weights, parts):
    with message("data.weights", *parts):
        check_weights(weights, ["a", "b"])
