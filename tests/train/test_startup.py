"""The seconds before the first step are told, part by part."""

import logging
import re
import time

from llmtrain.train.loop import train
from llmtrain.train.startup import Startup, process_age


def test_age_of_the_process():
    first = process_age()
    time.sleep(0.1)
    assert 0.05 < process_age() - first < 5
    assert 0 < first < 24 * 3600


def test_parts_add_up():
    startup = Startup()
    for part in ("imports", "model", "imports"):
        startup.lap(part)
    assert list(startup.parts) == ["imports", "model"]
    total = startup.last - startup.began
    assert abs(sum(startup.parts.values()) - total) < 1e-6
    assert startup.line().startswith(f"first step {total:.1f} s after the start: ")


def test_a_run_tells_it_once(configure, caplog):
    caplog.set_level(logging.INFO, logger="llmtrain")
    train(configure("run"))
    (told,) = (line for line in caplog.messages if "after the start" in line)
    assert re.match(r"first step \d+\.\d s after the start: ", told)
    for part in ("imports", "checks and data", "model and engine", "checkpoint", "first step"):
        assert part in told
