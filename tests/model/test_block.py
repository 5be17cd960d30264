import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.model.block import Block
from llmtrain.model.init import initialise


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_equations(make_blocks, norm_position):
    (block,) = make_blocks(1, norm_position=norm_position)
    initialise(block, 1)
    x = torch.randn(2, 5, 16)
    ctx = SequenceContext.dense(2, 5)
    y, state, aux = block(x, ctx)
    if norm_position == "pre":
        mid = x + block.mixer(block.norm1(x), ctx)[0]
        expected = mid + block.channel(block.norm2(mid), ctx)[0]
    else:
        mid = block.norm1(x + block.mixer(x, ctx)[0])
        expected = block.norm2(mid + block.channel(mid, ctx)[0])
    assert torch.equal(y, expected)
    assert state is None
    assert aux == {}


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_step_equals_forward(make_blocks, norm_position):
    (block,) = make_blocks(1, norm_position=norm_position)
    block = block.double()
    initialise(block, 1)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected, _, _ = block(x, SequenceContext.dense(2, 5))
    state = block.init_state(2, max_tokens=5, device="cpu", dtype=torch.float64)
    for t in range(5):
        ctx = SequenceContext(positions_BT=torch.full((2, 1), t), max_seqlen=1)
        y, state = block.step(x[:, t], ctx, state)
        torch.testing.assert_close(y, expected[:, t], atol=1e-13, rtol=1e-12)


def test_unknown_norm_position(make_blocks):
    (block,) = make_blocks(1)
    with pytest.raises(
        ValueError, match=r"norm_position: got 'sandwich', expected one of pre, post"
    ):
        Block(block.mixer, block.channel, block.norm1, block.norm2, norm_position="sandwich")
