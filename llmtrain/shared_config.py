"""One configuration for all ranks: rank 0 composes and checks, the others are given the result.

It happens before the process group exists, over the key-value store that the group will meet at,
because what a configuration says (device, backend) decides what the group is made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llmtrain.distributed import World

# Composing takes seconds; starting the ranks of a large job may take minutes.
TIMEOUT = timedelta(minutes=10)


@contextmanager
def shared(world: World, compose: Callable[[], dict]) -> Iterator[dict]:
    """Rank 0's configuration on every rank. The store lives as long as the context, so that the
    process group finds it where it was.

    When rank 0 raises ValueError, so does rank 0; the others end with exit code 2, silently.
    """
    if world.size == 1:
        yield compose()
        return
    opened, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
    store = PrefixStore("llmtrain/config", opened)
    if world.rank:
        config = json.loads(store.get("config"))
        store.set(f"read/{world.rank}", "yes")
        if config is None:
            raise SystemExit(2)
        yield config
        return
    try:
        config = compose()
    except ValueError:
        store.set("config", "null")
        # The store may live in this process: it stays until the others know.
        store.wait([f"read/{rank}" for rank in range(1, world.size)], TIMEOUT)
        raise
    store.set("config", json.dumps(config))
    yield config
