"""Exit codes of the `llmtrain` command; batch systems and drills decide by them.

0   finished
1   failure: of the machine, of a library, or a training that its guard ended
2   the user's mistake: a key, a value, a file
85  stopped by a signal, the last checkpoint is durable: the same command continues
86  hung: the watchdog ended the process; the same command continues
"""

from __future__ import annotations

FINISHED = 0
FAILURE = 1
USAGE_ERROR = 2
STOPPED = 85
HUNG = 86


class RunFailed(RuntimeError):
    """A run that cannot go on though nothing was typed wrong; its message says everything."""
