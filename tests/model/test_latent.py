"""Noise as a function of a key."""

import numpy as np
import pytest
import torch

from llmtrain.model.latent import mix, position_keys, token_keys, truncated_normal

MASK = 2**64 - 1


def splitmix64(x):
    """The finalizer in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_mix_is_splitmix64():
    """First outputs of splitmix64 from seed 0 and 1234567, as its authors' C code gives them."""
    golden = 0x9E3779B97F4A7C15
    known = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, outputs in known.items():
        states = [(seed + (i + 1) * golden) & MASK for i in range(3)]
        assert [splitmix64(state) for state in states] == outputs
        numbers = torch.from_numpy(np.array(states, dtype=np.uint64).view(np.int64))
        assert mix(numbers).numpy().view(np.uint64).tolist() == outputs


@pytest.mark.parametrize("seeded", [False, True])
def test_distribution(seeded):
    positions_BT = torch.arange(500).expand(2, 500)
    seeds_B = torch.tensor([5, 6])
    keys = token_keys(seeds_B, 500) if seeded else position_keys(positions_BT)
    noise = truncated_normal(keys, 200, dtype=torch.float64)
    assert noise.abs().max() <= 3.0
    assert noise[0].mean().abs() < 4 / 100_000**0.5
    # variance of a standard normal cut off at 3: 1 - 2 * 3 phi(3) / erf(3 / sqrt 2)
    assert noise[0].var().item() == pytest.approx(0.97334, abs=4 * (2 / 100_000) ** 0.5)
    sample = np.sort(noise[0].flatten().numpy())
    grid = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    normal = (torch.special.ndtr(grid) - torch.special.ndtr(torch.tensor(-3.0))) / 0.9973
    share = np.searchsorted(sample, grid.numpy()) / sample.size
    assert np.abs(share - normal.numpy()).max() < 4 / 100_000**0.5
    correlation = np.corrcoef(noise[0, :100].numpy())
    assert np.abs(correlation - np.eye(100)).max() < 6 / 200**0.5
    assert torch.equal(noise[0], noise[1]) is not seeded


def test_a_part_of_a_row_has_the_values_of_the_whole():
    whole = truncated_normal(position_keys(torch.arange(30)[None]), 8, dtype=torch.float32)
    part = truncated_normal(position_keys(torch.arange(12, 17)[None]), 8, dtype=torch.float32)
    assert torch.equal(whole[:, 12:17], part)


def test_seeds_differ():
    keys = [token_keys(torch.tensor([seed]), 4) for seed in (0, 1, 2**62)]
    assert len({tuple(key[0].tolist()) for key in keys}) == 3
