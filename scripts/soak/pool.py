"""Several pieces of work at once, each in a process forked from this one."""

from __future__ import annotations

import time
from collections.abc import Callable

from soak.ranks import Forked


def run(
    work: list[tuple[str, Callable[[], None]]],
    *,
    at_once: int,
    deadline: float | None = None,
) -> list[str]:
    """Do all (name, function), some at once. deadline: seconds after which nothing more is begun.
    Returns the names of those that failed or were not begun."""
    began, waiting, failed = time.monotonic(), list(work), []
    running: dict[str, Forked] = {}
    while waiting or running:
        late = deadline is not None and time.monotonic() - began > deadline
        if late and waiting:
            failed += [name for name, _ in waiting]
            waiting.clear()
        while waiting and len(running) < at_once:
            name, function = waiting.pop(0)
            running[name] = Forked(lambda call=function: call() or 0)
        for name, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[name]
                if code:
                    failed.append(name)
                    print(f"{name}: its process failed ({code})", flush=True)
        time.sleep(0.02)
    return failed
