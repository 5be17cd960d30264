"""Where the seconds between the start of a process and its first step went."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """lap(name) ends a part; the first one begins with the process."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic() - process_age()
        self.parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def line(self) -> str:
        told = ", ".join(f"{seconds:.1f} s {part}" for part, seconds in self.parts.items())
        return f"first step {self.last - self.began:.1f} s after the start: {told}"


def process_age() -> float:
    """Seconds since this process began; 0 where /proc does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks = int(fields[19])  # field 22 of proc(5): since the machine booted
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
