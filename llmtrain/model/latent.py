"""Noise that is a function of numbers and of nothing else: no generator, no order of drawing.

    key of a token -> 64 bits for each channel (splitmix64) -> uniform -> normal, cut off at 3

splitmix64: Steele, Lea and Flood 2014 (OOPSLA, "Fast splittable pseudorandom number generators"),
figure 16: a counter times an odd constant, then two rounds of shifts and multiplications. So the
same values come on every device (up to the rounding of erfinv), in any part of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# int64 holds the 64 bits; products wrap around, as they should.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
EVALUATION_SEED = 0x5DEECE66D
CUT = 3.0  # standard deviations


def mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64, of int64."""
    x = (x ^ shifted(x, 30)) * FACTORS[0]
    x = (x ^ shifted(x, 27)) * FACTORS[1]
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def position_keys(positions_BT: Tensor) -> Tensor:
    """Keys [B, T] of tokens by their position in the document: the same for all rows."""
    return mix(mix(positions_BT * GOLDEN) ^ EVALUATION_SEED)


def token_keys(seeds_B: Tensor, tokens: int) -> Tensor:
    """Keys [B, T] of tokens by their place in the row. seeds_B: int64, one a row."""
    places_T = torch.arange(tokens, device=seeds_B.device)
    return mix(mix(seeds_B * GOLDEN)[:, None] ^ (places_T * GOLDEN))


def truncated_normal(keys_BT: Tensor, d_model: int, *, dtype: torch.dtype) -> Tensor:
    """noise_BTD: standard normal, cut off at CUT, independent for different keys and channels."""
    channels_D = torch.arange(1, d_model + 1, device=keys_BT.device) * GOLDEN
    bits_BTD = mix(keys_BT[..., None] + channels_D)
    uniform_BTD = (shifted(bits_BTD, 40).to(dtype) + 0.5) / 2.0**24
    # erf(CUT / sqrt 2) of the normal distribution lies within the cut
    inside = math.erf(CUT / math.sqrt(2))
    return math.sqrt(2) * torch.erfinv((2 * uniform_BTD - 1) * inside)
