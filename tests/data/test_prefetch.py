import threading
import time

import pytest
import torch

from llmtrain.data.batch import Batch
from llmtrain.data.loader import Prefetcher, TokenLoader

SETTINGS = {"rank": 0, "world": 1, "mask_documents": True, "device": "cpu"}


class Counted:
    """A loader that notes what it is asked for."""

    rows_per_epoch = 100

    def __init__(self, fail_at=None, wait=0.0):
        self.asked, self.fail_at, self.wait = [], fail_at, wait

    def batch(self, first_sample, rows):
        time.sleep(self.wait)
        if first_sample == self.fail_at:
            raise OSError("the disk went away")
        self.asked.append(first_sample)
        tokens_BT = torch.full((rows, 4), first_sample)
        return Batch(
            tokens_BT=tokens_BT,
            targets_BT=tokens_BT,
            weights_BT=torch.ones(rows, 4),
            doc_starts_BT=torch.zeros(rows, 4, dtype=torch.bool),
        )


def prefetch(loader, **changes):
    return Prefetcher(
        loader, **{"start_step": 0, "global_rows": 4, "micro_rows": 2, **SETTINGS, **changes}
    )


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def firsts(micros):
    return [int(micro.tokens_BT[0, 0]) for micro in micros]


def test_steps_in_order_and_an_end():
    with prefetch(Counted(), start_step=3, stop_step=6) as batches:
        assert [firsts(micros) for micros in batches] == [[12, 14], [16, 18], [20, 22]]
        assert list(batches) == []
    assert prefetch_threads() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_contiguous_parts(rank):
    with prefetch(Counted(), global_rows=8, world=2, rank=rank, stop_step=2) as batches:
        seen = [firsts(micros) for micros in batches]
    assert seen == [[4 * rank, 4 * rank + 2], [8 + 4 * rank, 8 + 4 * rank + 2]]


def test_works_ahead_but_not_further_than_depth():
    loader = Counted()
    with prefetch(loader, depth=3) as batches:
        deadline = time.monotonic() + 10
        while len(loader.asked) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert loader.asked == [0, 2, 4, 6, 8, 10]
        next(batches)
        while len(loader.asked) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loader.asked[6:] == [12, 14]


def test_an_error_reaches_the_step_it_belongs_to():
    with prefetch(Counted(fail_at=10)) as batches:
        assert firsts(next(batches)) == [0, 2]
        assert firsts(next(batches)) == [4, 6]
        with pytest.raises(OSError, match="the disk went away"):
            next(batches)
    assert prefetch_threads() == []


def test_close_ends_the_thread_and_the_iteration():
    loader = Counted(wait=0.05)
    batches = prefetch(loader, depth=8)
    next(batches)
    batches.close()
    asked = len(loader.asked)
    assert prefetch_threads() == []
    assert list(batches) == []
    batches.close()
    time.sleep(0.2)
    assert len(loader.asked) == asked < 16


def test_waiting_is_measured():
    with prefetch(Counted(wait=0.05)) as batches:
        next(batches)
        assert 0.02 < batches.waited_seconds < 5
        time.sleep(0.5)
        next(batches)
        assert batches.waited_seconds < 0.05


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"world": 101, "global_rows": 202}, ["101 ranks", "100 rows", "fewer ranks"]),
        ({"world": 3}, ["4 rows a step on 3 ranks", "multiple", "global_batch_tokens"]),
        ({"global_rows": 0}, ["0 rows a step", "multiple"]),
        ({"micro_rows": 3}, ["micro_batch=3", "the 4 rows", "divisor"]),
        ({"micro_rows": 0}, ["micro_batch=0", "divisor"]),
    ],
)
def test_rows_that_cannot_be_shared(message, changes, parts):
    with message(*parts):
        prefetch(Counted(), **changes)
    assert prefetch_threads() == []


@pytest.mark.gpu
@pytest.mark.parametrize("mask_documents", [True, False])
def test_on_a_gpu_the_same_batches(corpus, mask_documents):
    loader = TokenLoader.open(corpus[0], "train", seq_len=16, seed=0)
    settings = {"stop_step": 8, "mask_documents": mask_documents}
    with prefetch(loader, **settings) as host, prefetch(loader, device="cuda", **settings) as gpu:
        for ours, theirs in zip(host, gpu, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert b.tokens_BT.is_cuda
                assert b.ctx.positions_BT.is_cuda
                for field in ("tokens_BT", "targets_BT", "weights_BT"):
                    assert torch.equal(getattr(a, field), getattr(b, field).cpu())
                for field in ("positions_BT", "doc_ids_BT", "cu_seqlens"):
                    value = getattr(a.ctx, field)
                    if value is None:
                        assert getattr(b.ctx, field) is None
                    else:
                        assert torch.equal(value, getattr(b.ctx, field).cpu())
