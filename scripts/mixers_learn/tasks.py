"""The synthetic tasks as streams of batches: a function of the task, the seed and the step alone,
so that every arm reads the same tokens in the same order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmtrain_eval.synthetic import NOISE, Examples, group, recall, state_tracking
from torch import Tensor

from llmtrain.model.init import keyed_seed


@dataclass(frozen=True, kw_only=True)
class Recall:
    """sizes: (tokens, pairs) trained on, a batch of one size after the other; tested: further
    sizes. step_tokens: of a batch. test_questions: at least, of each size."""

    name: str = "recall"
    sizes: tuple[tuple[int, int], ...]
    tested: tuple[tuple[int, int], ...]
    vocab_size: int
    step_tokens: int
    test_questions: int

    def shape(self, step: int) -> tuple[int, int]:
        return self.sizes[step % len(self.sizes)]

    def batch(self, step: int, generator: torch.Generator) -> Examples:
        tokens, pairs = self.shape(step)
        rows = self.step_tokens // tokens
        return recall(rows, tokens, pairs, vocab_size=self.vocab_size, generator=generator)

    def tests(self, generator: torch.Generator) -> list[Examples]:
        return [
            recall(
                max(16, self.test_questions // pairs),
                tokens,
                pairs,
                vocab_size=self.vocab_size,
                generator=generator,
            )
            for tokens, pairs in (*self.sizes, *self.tested)
        ]

    def scores(self, correct: list[Tensor]) -> dict[str, float]:
        """ "tokens:pairs" -> accuracy. correct: of each test, [B, questions]."""
        sizes = (*self.sizes, *self.tested)
        return {f"{t}:{p}": float(c.mean()) for (t, p), c in zip(sizes, correct, strict=True)}

    @property
    def chance(self) -> float:
        return 2 / (self.vocab_size - NOISE)


@dataclass(frozen=True, kw_only=True)
class WordProblem:
    """name: one of llmtrain_eval.synthetic.GROUPS. tokens: a row of the training; lengths: of the
    test, each scored over its second half."""

    name: str
    tokens: int
    lengths: tuple[int, ...]
    step_tokens: int
    test_rows: int

    def shape(self, step: int) -> tuple[int, int]:
        return (self.tokens, self.tokens)

    def batch(self, step: int, generator: torch.Generator) -> Examples:
        rows = self.step_tokens // self.tokens
        return state_tracking(rows, self.tokens, self.name, generator=generator)

    def tests(self, generator: torch.Generator) -> list[Examples]:
        return [state_tracking(self.test_rows, max(self.lengths), self.name, generator=generator)]

    def scores(self, correct: list[Tensor]) -> dict[str, float]:
        """Length -> accuracy at positions length/2 .. length - 1; position 0 has no question."""
        (whole,) = correct
        return {str(n): float(whole[:, n // 2 - 1 : n - 1].mean()) for n in self.lengths}

    @property
    def vocab_size(self) -> int:
        return group(self.name).order + 1

    @property
    def chance(self) -> float:
        return 1 / group(self.name).order


Task = Recall | WordProblem


def seeded(device: torch.device, seed: int, name: str) -> torch.Generator:
    """A generator on the device for one named thing. Another kind of device draws others."""
    return torch.Generator(device).manual_seed(keyed_seed(seed, name))
