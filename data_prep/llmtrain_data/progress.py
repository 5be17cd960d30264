"""Progress on the console, always: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 5.0


class Progress:
    """Counts work and prints it to stderr. total: bytes of text expected, 0 when unknown."""

    def __init__(self, what: str, *, total: int = 0):
        self.what = what
        self.total = total
        self.documents = self.bytes = self.tokens = 0
        self._live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = self._start

    def add(self, *, documents: int, size: int, tokens: int = 0) -> None:
        """size: bytes of text."""
        self.documents += documents
        self.bytes += size
        self.tokens += tokens
        interval = TERMINAL_SECONDS if self._live else LOG_SECONDS
        if time.monotonic() - self._shown >= interval:
            self._shown = time.monotonic()
            self._print(end="\r" if self._live else "\n")

    def skip(self, size: int) -> None:
        """That many bytes of the total were done by an earlier run."""
        self.total -= size

    def finish(self) -> None:
        self._print(end="\n", final=True)

    def _print(self, *, end: str, final: bool = False) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.bytes / seconds
        line = f"{self.what}: {self.documents:,} documents, {self.bytes / 1e6:,.1f} MB"
        if self.tokens:
            line += f", {self.tokens / 1e6:,.2f} M tokens"
        line += f", {rate / 1e6:,.1f} MB/s"
        if final:
            line += f", {seconds:,.1f} s"
        elif self.total > 0 and rate:
            left = max(self.total - self.bytes, 0) / rate
            line += f", {100 * self.bytes / self.total:.0f} %, {left:,.0f} s left"
        print(line.ljust(100) if self._live else line, end=end, file=sys.stderr, flush=True)


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """Says that something is going on, every LOG_SECONDS, and how long it took."""
    start = time.monotonic()
    done = threading.Event()

    def beat() -> None:
        while not done.wait(LOG_SECONDS):
            print(f"{what}: {time.monotonic() - start:,.0f} s", file=sys.stderr, flush=True)

    print(f"{what} ...", file=sys.stderr, flush=True)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(f"{what}: done in {time.monotonic() - start:,.1f} s", file=sys.stderr, flush=True)
