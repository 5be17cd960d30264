"""A small corpus of random words, prepared by `llmtrain prep`; runs read it more than once."""

from __future__ import annotations

import random
import time
from pathlib import Path

from soak.ranks import begin

DOCUMENTS = 24


def prepared(folder: Path, how: str) -> list[str]:
    """Make the corpus unless it is there; the overrides that choose it."""
    text = folder / "text"
    overrides = [
        "data=text",
        f"data.sources.text.root={text}",
        f"data.root={folder / 'data'}",
        "data.val_fraction=0.2",
        "data.workers=1",
        "tokenizer.vocab_size=300",
    ]
    if (folder / "data").exists():
        return overrides
    text.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 6))) for _ in range(60)]
    for number in range(DOCUMENTS):
        content = " ".join(draw.choices(words, k=draw.randint(20, 400)))
        (text / f"{number:02d}.txt").write_text(content, encoding="utf-8")
    log = folder / "prep.log"
    process = begin(["prep", *overrides], {}, log, how)
    while process.poll() is None:
        time.sleep(0.05)
    if process.poll():
        raise RuntimeError(f"soak: the corpus could not be prepared:\n{log.read_text()}")
    return overrides
