"""Attention's benchmark cases: documents as the trainer packs them, a reference that is one."""

import itertools

import pytest
import torch
from llmtrain_kernels.attention import attention
from llmtrain_kernels.bench.attention import (
    DENSE,
    LEAST_BOUNDARIES,
    QUICK,
    Shape,
    auto,
    boundaries,
    cases,
    exact,
    make,
    packed_known,
)

SMALL = Shape(batch=2, tokens=40, heads=4, groups=2, width=8, mean_document=9)
CPU = torch.device("cpu")


def test_boundaries():
    known = boundaries(SMALL)
    assert known[0] == 0
    assert known[-1] == 80
    assert 40 in known
    assert all(a < b for a, b in itertools.pairwise(known))
    assert boundaries(DENSE[0]) == [0, 4096, 8192, 12288, 16384]


def test_inputs_of_packed_rows():
    given = make(SMALL, CPU, torch.float32)
    cu_seqlens, known = given["cu_seqlens"], boundaries(SMALL)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[: len(known)].tolist() == known
    assert cu_seqlens[len(known) :].eq(80).all()
    assert cu_seqlens.numel() == LEAST_BOUNDARIES + 1
    ids = given["doc_ids_BT"].flatten()
    assert (ids.diff().nonzero().flatten() + 1).tolist() == known[1:-1]


@pytest.mark.parametrize("shape", [QUICK, SMALL], ids=str)
def test_the_reference_is_attentions(shape):
    given = make(shape, CPU, torch.float64)
    results = []
    for call in (exact, lambda **z: auto(shape.tokens, **z, backend="reference")):
        o = call(**given)
        leaves = [given[name] for name in "qkv"]
        results.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_known_sizes_are_handed_on(monkeypatch):
    seen = {}

    def spy(q, k, v, **given):
        seen.update(given)
        return attention(q, k, v, doc_ids_BT=given["doc_ids_BT"])

    monkeypatch.setattr("llmtrain_kernels.bench.attention.attention", spy)
    given, known = make(SMALL, CPU, torch.float32), boundaries(SMALL)
    longest = max(b - a for a, b in itertools.pairwise(known))
    packed_known(len(known) - 1, longest, "varlen")(**given)
    assert seen["cu_seqlens"].tolist() == known
    assert (seen["max_seqlen"], seen["backend"]) == (longest, "varlen")


def test_shapes():
    names = [case.shape for case in cases(quick=False)]
    assert "B4 T4096 H16/16 K128" in names
    assert "B1 T16384 H32/8 K128 documents of 2048" in names
    assert "B4 T4096 H16/16 K128 documents of a row" in names
    packed, dense = (case for case in cases(quick=True)[::-1])
    assert packed.costs[0].flops < dense.costs[0].flops
