import numpy as np
import pytest

from llmtrain.data.permutation import Permutation, derive_key, hash64


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 10, 63, 64, 65, 97, 1000, 4099, 65536])
def test_a_permutation_is_one(size):
    for key in range(5):
        image = Permutation(size, key)(np.arange(size))
        assert np.array_equal(np.sort(image), np.arange(size))


def test_points_do_not_depend_on_each_other():
    permutation = Permutation(1234, 7)
    whole = permutation(np.arange(1234))
    for index in (0, 1, 600, 1233):
        assert permutation(np.array([index]))[0] == whole[index]


def test_a_huge_range():
    size = 10**12 + 39
    index_B = np.random.default_rng(0).integers(0, size, 10_000)
    image_B = Permutation(size, 3)(index_B)
    assert image_B.min() >= 0
    assert image_B.max() < size
    assert len(np.unique(image_B)) == len(np.unique(index_B))


def test_keys_give_unrelated_permutations():
    size = 1000
    images = np.stack([Permutation(size, key)(np.arange(size)) for key in range(300)])
    # Every element goes everywhere equally often: chi-square of element 0 over ten bins.
    counts = np.bincount(images[:, 0] * 10 // size, minlength=10)
    assert ((counts - 30.0) ** 2 / 30).sum() < 30
    # Fixed points and kept neighbours are about one a permutation, as of a random one.
    assert 0.6 < (images == np.arange(size)).sum(axis=1).mean() < 1.5
    assert 0.6 < (np.diff(images, axis=1) == 1).sum(axis=1).mean() < 1.5


def test_hash_is_splitmix64():
    """Published outputs of SplitMix64 with seed 1234567 (the reference implementation's)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash64(1234567, np.arange(3, dtype=np.uint64)).tolist() == expected


def test_hash_is_uniform():
    values = hash64(9, np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(values)) == 100_000
    for shift in (0, 30, 60):
        counts = np.bincount(((values >> np.uint64(shift)) % np.uint64(16)).astype(int))
        assert ((counts - 6250.0) ** 2 / 6250).sum() < 45


def test_keys_name_their_purpose():
    keys = {derive_key(*parts) for parts in [("a", 1), ("a", 2), ("a1",), ("a", "1", 2), ("b", 1)]}
    assert len(keys) == 5
    assert derive_key("a", 1) == derive_key("a", "1")


def test_empty_domain(message):
    with message("size=0", "at least 1"):
        Permutation(0, 1)
