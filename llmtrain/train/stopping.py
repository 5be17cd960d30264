"""Stopping on request: a signal asks the loop to save and end after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

# Slurm's --signal=USR2@300, its SIGTERM before a kill, and Ctrl-C. Not USR1: NCCL may catch it.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Within this context a signal sets `requested` instead of ending the process.

    A second Ctrl-C interrupts at once. A pipe whose reader died (a compiler's helper process, which
    a signal to the whole process group ends) is an error in that call, not the end of this process.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self.previous = self.install()
        return self

    def install(self) -> dict[int, object]:
        """Set the handlers (again), and return those that were there.

        Native libraries, compilers above all, install handlers of their own when first used, so the
        training loop repeats this every step; it costs microseconds.
        """
        handlers = dict.fromkeys(SIGNALS, self.handle) | {signal.SIGPIPE: signal.SIG_IGN}
        return {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
