"""Costs against what torch counts and saves."""

import pytest
import torch
from llmtrain_kernels.attention import attention, cost, visible_pairs
from llmtrain_kernels.cost import Cost
from torch.utils.flop_counter import FlopCounterMode

B, H, G, K, V = 2, 4, 2, 8, 6


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("sinks", [0, 1, 4, 20])
def test_visible_pairs_are_those_of_the_mask(tokens, causal, window, sinks):
    if sinks and (window is None or not causal):
        window, causal = 2, True
    pairs = sum(
        (j <= i or not causal) and (window is None or abs(i - j) < window or j < sinks)
        for i in range(tokens)
        for j in range(tokens)
    )
    assert visible_pairs(tokens, causal=causal, window=window, sinks=sinks) == pairs


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"causal": False},
        {"window": 5},
        {"window": 5, "causal": False},
        {"window": 5, "sinks": 3},
    ],
    ids=str,
)
def test_attention_flops_are_those_counted(arguments):
    """Exactly, forward and backward: the reference multiplies visible pairs only."""
    tokens = 17
    q, k, v = (
        torch.randn(B, tokens, heads, width, requires_grad=True)
        for heads, width in ((H, K), (G, K), (G, V))
    )
    with FlopCounterMode(display=False) as forward:
        o = attention(q, k, v, backend="reference", **arguments)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    sizes = {"heads": H, "kv_heads": G, "k_width": K, "v_width": V, "dtype": q.dtype}
    expected = cost([tokens] * B, **sizes, **arguments)
    assert [c.flops for c in expected] == [
        forward.get_total_flops(),
        backward.get_total_flops(),
    ]
    # the part of the forward pass that makes the scores
    assert expected[1].recomputed_flops == expected[0].flops * K / (K + V)


def test_documents_cost_what_each_costs_alone():
    sizes = {"heads": H, "kv_heads": G, "k_width": K, "v_width": V, "dtype": torch.bfloat16}
    whole = cost([3, 1, 9], **sizes)
    parts = [cost([length], **sizes) for length in (3, 1, 9)]
    for i in (0, 1):
        assert whole[i] == parts[0][i] + parts[1][i] + parts[2][i]
    assert whole[0].flops < cost([13], **sizes)[0].flops


def test_attention_bytes_are_those_of_its_tensors():
    tokens = 17
    q, k, v = (torch.randn(B, tokens, heads, K, requires_grad=True) for heads in (H, G, G))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x
    ):
        o = attention(q, k, v)
    sizes = {"heads": H, "kv_heads": G, "k_width": K, "v_width": K, "dtype": q.dtype}
    forward, backward = cost([tokens] * B, **sizes)
    operands = sum(x.numel() * 4 for x in (q, k, v))
    log_sums = B * tokens * H * 4
    assert forward.bytes_read == operands
    assert forward.bytes_written == o.numel() * 4 + log_sums
    assert forward.saved_bytes == sum(x.numel() * x.itemsize for x in saved.values())
    assert backward.bytes_read == forward.saved_bytes + o.numel() * 4
    assert backward.bytes_written == operands


def test_seconds_is_the_slower_of_compute_and_memory():
    one = Cost(flops=100.0, recomputed_flops=20.0, bytes_read=6.0, bytes_written=4.0)
    assert one.seconds(flops_per_second=10.0, bytes_per_second=100.0) == 12.0
    assert one.seconds(flops_per_second=1e9, bytes_per_second=5.0) == 2.0
    assert (one + one).flops == 200.0
