"""Randomness that is computed from a counter instead of drawn: hashes and permutations.

Every value is a pure function of (key, index), so any rank and any resumed run computes the same
without replaying what came before. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood
2014); permutations of an arbitrary range are Feistel networks over two mixed-radix digits with
cycle walking (Black, Rogaway 2002, "Ciphers with arbitrary finite domains", section 5).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6


def derive_key(*parts: str | int) -> int:
    """64-bit key that names one purpose: the parts, separated, hashed."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def hash64(key: int, index_B: np.ndarray) -> np.ndarray:
    """uint64 [B], uniform, from uint64 counters [B]."""
    with np.errstate(over="ignore"):
        z_B = np.uint64(key) + (index_B + np.uint64(1)) * GOLDEN
        z_B = (z_B ^ (z_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_B = (z_B ^ (z_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_B ^ (z_B >> np.uint64(31))


class Permutation:
    """A pseudo-random bijection of range(size), evaluated at single points."""

    def __init__(self, size: int, key: int):
        if size < 1:
            raise ValueError(f"Permutation: size={size}, expected at least 1; give it a domain")
        self.size = size
        self.left = math.isqrt(size - 1) + 1  # left * right >= size, barely
        self.right = -(-size // self.left)
        self.keys = [derive_key(key, index) for index in range(ROUNDS)]

    def __call__(self, index_B: np.ndarray) -> np.ndarray:
        """int64 [B] of values below size -> int64 [B], their images."""
        value_B = self._network(index_B.astype(np.uint64))
        while (outside_B := value_B >= self.size).any():
            value_B[outside_B] = self._network(value_B[outside_B])
        return value_B.astype(np.int64)

    def _network(self, value_B: np.ndarray) -> np.ndarray:
        """A bijection of range(left * right): a round shifts one digit by a hash of the other."""
        left, right = np.uint64(self.left), np.uint64(self.right)
        high_B, low_B = np.divmod(value_B, right)
        for index, key in enumerate(self.keys):
            if index % 2:
                low_B = (low_B + hash64(key, high_B) % right) % right
            else:
                high_B = (high_B + hash64(key, low_B) % left) % left
        return high_B * right + low_B
