"""When to stop: too many steps in a row could not be applied."""

from __future__ import annotations


class SkipGuard:
    """Counts steps that were not applied; ValueError after `limit` of them in a row."""

    def __init__(self, limit: int, skipped: int = 0):
        self.limit, self.skipped = limit, skipped
        self.in_a_row = 0

    def saw(self, step: int, applied: bool) -> None:
        if applied:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"training: the last {self.in_a_row} steps (up to step {step}) were skipped, their "
                f"loss or gradient was not finite; expected fewer than train.max_skipped="
                f"{self.limit}. Weights are as after step {step - self.in_a_row}. ledger.jsonl has "
                "every step; lower optimizer.lr or train.grad_clip, or look at the data of the "
                "samples named there, and continue from a checkpoint with train.resume=<folder>"
            )
