"""Synthetic tasks made from a seed: associative recall and state tracking.

Recall (multi-query associative recall; Arora et al. 2023, arXiv:2312.04927, section 3.2): pairs of
key and value, then the keys again in another order; at each key, its value must be said. What a
model needs is a state that holds all pairs.

    k1 v1 k2 v2 k3 v3 . . k2 . . . k1 . . . k3 .
                          v2       v1       v3      where the key is asked for

State tracking (word problems of groups; Merrill et al. 2024, arXiv:2404.08819, section 4): tokens
are elements of a group; at every position the product of all of them so far must be said. Parity
(the group of two elements) and S3 are solvable; A5 and S5 are not, and their word problem is
complete for NC1. Grazzi et al. 2024 (arXiv:2411.12537) show what negative eigenvalues add. A row
begins with a token of its own: attention with relative positions alone cannot tell one element
from two equal ones, since an average of equal values is that value.

Everything is tensors, on the device of the generator, and a function of the generator's state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 64  # tokens that are neither key nor value


class Examples(NamedTuple):
    """Rows of tokens and the questions in them, equally many a row.

    tokens_BT: int64. asked: int64 [B, questions], positions in the row, ascending. answers: int64
    [B, questions], the token to predict there.
    """

    tokens_BT: Tensor
    asked: Tensor
    answers: Tensor

    def targets(self) -> tuple[Tensor, Tensor]:
        """targets_BT int64 and weights_BT float32 (1 where a question is), as objectives want."""
        targets_BT = torch.zeros_like(self.tokens_BT).scatter(1, self.asked, self.answers)
        weights_BT = torch.zeros_like(self.tokens_BT, dtype=torch.float32)
        return targets_BT, weights_BT.scatter(1, self.asked, 1.0)


def recall(
    rows: int,
    tokens: int,
    pairs: int,
    *,
    vocab_size: int,
    generator: torch.Generator,
    power: float = 0.01,
) -> Examples:
    """Rows of `pairs` key-value pairs, each asked for once.

    Token ids: [0, NOISE) fill what is left, then keys, then values, half of the rest each. A row
    has different keys; its values may be equal. The queries stand at even distances behind the
    pairs; distance 2 j has a probability proportional to (j + 1)^(power - 1), so that most are
    near and some are far. ValueError when the pairs or their keys do not fit.
    """
    slots = (tokens - 2 * pairs) // 2
    if pairs < 1 or slots < pairs:
        raise ValueError(
            f"recall: got {pairs} pairs for rows of {tokens} tokens, expected 1 to {tokens // 4} "
            "pairs (two tokens each, and two for each query); change either"
        )
    half = (vocab_size - NOISE) // 2
    if half < pairs:
        raise ValueError(
            f"recall: got vocab_size={vocab_size}, expected at least {NOISE + 2 * pairs} for "
            f"{pairs} different keys; raise it"
        )
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    tokens_BT = torch.randint(NOISE, (rows, tokens), generator=generator, device=device)
    keys = NOISE + uniform(rows, half).topk(pairs, dim=1).indices
    values = torch.randint(half, (rows, pairs), generator=generator, device=device) + NOISE + half
    # The largest of log p + Gumbel noise are a draw without replacement; rand() may return 0.
    log_p = (power - 1) * torch.arange(1, slots + 1, device=device, dtype=torch.float32).log()
    gumbel = -(-uniform(rows, slots).clamp(min=1e-12).log()).log()
    slot = (log_p + gumbel).topk(pairs, dim=1).indices.sort(dim=1).values
    asked = 2 * pairs + 2 * slot
    order = uniform(rows, pairs).argsort(dim=1)
    tokens_BT[:, 0 : 2 * pairs : 2] = keys
    tokens_BT[:, 1 : 2 * pairs : 2] = values
    tokens_BT.scatter_(1, asked, keys.gather(1, order))
    return Examples(tokens_BT, asked, values.gather(1, order))


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """A finite group of permutations.

    elements: permutations as tuples, the identity first; product: int64 [n, n], the number of
    a * b, which applies b first; letters: int64, the elements that a row may contain.
    """

    name: str
    elements: tuple[tuple[int, ...], ...]
    product: Tensor
    letters: Tensor

    @property
    def order(self) -> int:
        """Number of elements, and the token that begins a row."""
        return len(self.elements)


# name -> (degree, only even permutations, only letters that move at most two points)
GROUPS = {
    "parity": (2, False, False),
    "s3": (3, False, False),
    "a5": (5, True, False),
    "s5": (5, False, False),
    "s5_swaps": (5, False, True),
}


def is_even(permutation: tuple[int, ...]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(a > b for a, b in pairs) % 2 == 0


@cache
def group(name: str) -> Group:
    """One of GROUPS, on the CPU. s5_swaps: rows of transpositions and the identity (Grazzi et al.
    2024, section 5.1), whose products still reach all of S5."""
    if name not in GROUPS:
        raise ValueError(
            f"state tracking: got group {name!r}, expected one of {', '.join(GROUPS)}; choose one"
        )
    degree, even, swaps = GROUPS[name]
    permutations = itertools.permutations(range(degree))
    elements = tuple(p for p in permutations if not even or is_even(p))
    number = {permutation: i for i, permutation in enumerate(elements)}
    product = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
    moved = [sum(i != j for i, j in enumerate(p)) for p in elements]
    letters = [i for i, count in enumerate(moved) if not swaps or count <= 2]
    return Group(
        name=name,
        elements=elements,
        product=torch.tensor(product),
        letters=torch.tensor(letters),
    )


def running_products(tokens_BT: Tensor, product: Tensor) -> Tensor:
    """y_t = x_1 * x_2 * ... * x_t, int64 [B, T], in log2(T) steps (the product is associative).

    product: int64 [n, n], on the device of the tokens.
    """
    y_BT, reach = tokens_BT, 1
    while reach < tokens_BT.shape[1]:
        joined = product[y_BT[:, :-reach], y_BT[:, reach:]]
        y_BT = torch.cat([y_BT[:, :reach], joined], dim=1)
        reach *= 2
    return y_BT


def state_tracking(rows: int, tokens: int, name: str, *, generator: torch.Generator) -> Examples:
    """Rows of a first token (the group's order) and random letters of the group `name`, asked for
    the running product at every letter; its vocabulary is the group's order + 1."""
    if tokens < 2:
        raise ValueError(
            f"state tracking: got rows of {tokens} tokens, expected at least 2: the first token "
            "and a letter; raise it"
        )
    device, chosen = generator.device, group(name)
    letters = chosen.letters.to(device)
    index = torch.randint(len(letters), (rows, tokens - 1), generator=generator, device=device)
    word = letters[index]
    return Examples(
        torch.cat([word.new_full((rows, 1), chosen.order), word], dim=1),
        torch.arange(1, tokens, device=device).expand(rows, tokens - 1),
        running_products(word, chosen.product.to(device)),
    )


def accuracy(logits: Tensor, answers: Tensor) -> Tensor:
    """1.0 where the likeliest token is the answer, float32 in the shape of answers.

    logits: [..., O]; answers: int64 [...].
    """
    return (logits.argmax(dim=-1) == answers).float()
