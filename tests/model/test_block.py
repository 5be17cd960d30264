import pytest
import torch

from llmtrain.channels.none import NoChannel
from llmtrain.context import SequenceContext
from llmtrain.model.block import NORM_POSITIONS, Block
from llmtrain.model.init import initialise


def half(block, position, x, f, norm, norm_out):
    """The equations of the module's docstring."""
    if position == "pre":
        return x + f(norm(x))
    if position == "post":
        return norm(x + f(x))
    if position == "peri":
        return x + norm_out(f(norm(x)))
    return norm_out(x + f(norm(x)))


def random_gains(block):
    """Norms that differ, so that exchanging two of them shows."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith("norm"):
                parameter.uniform_(0.5, 2.0)


@pytest.mark.parametrize("position", NORM_POSITIONS)
def test_equations(make_blocks, position):
    (block,) = make_blocks(1, norm_position=position)
    initialise(block, 1)
    random_gains(block)
    x, ctx = torch.randn(2, 5, 16), SequenceContext.dense(2, 5)
    y, state, aux = block(x, ctx)
    mid = half(block, position, x, lambda z: block.mixer(z, ctx)[0], block.norm1, block.norm1_out)
    expected = half(
        block, position, mid, lambda z: block.channel(z, ctx)[0], block.norm2, block.norm2_out
    )
    assert torch.equal(y, expected)
    assert (state, aux) == (None, {})
    count = sum(name.startswith("norm") for name, _ in block.named_parameters())
    assert count == (4 if position in ("peri", "sandwich") else 2)
    assert block.normalises_output == (position in ("post", "sandwich"))


@pytest.mark.parametrize("position", NORM_POSITIONS)
def test_without_channel(make_blocks, position):
    (full,) = make_blocks(1, norm_position=position)
    channel = NoChannel(16, layer_idx=0, n_layers=1)
    block = Block(full.mixer, channel, lambda: torch.nn.LayerNorm(16), norm_position=position)
    initialise(block.mixer, 1)
    x, ctx = torch.randn(2, 5, 16), SequenceContext.dense(2, 5)
    f = block.mixer
    expected = half(block, position, x, lambda z: f(z, ctx)[0], block.norm1, block.norm1_out)
    assert torch.equal(block(x, ctx)[0], expected)
    assert not any("norm2" in name for name, _ in block.named_parameters())
    assert block.flops_per_token(5) == block.mixer.flops_per_token(5)
    state = block.init_state(2, max_tokens=5, device="cpu", dtype=torch.float32)
    for t in range(5):
        step_ctx = SequenceContext(positions_BT=torch.full((2, 1), t), max_seqlen=1)
        y, state = block.step(x[:, t], step_ctx, state)
        torch.testing.assert_close(y, expected[:, t])


@pytest.mark.parametrize("position", NORM_POSITIONS)
@pytest.mark.parametrize("extra", [False, True])
def test_step_equals_forward(make_blocks, position, extra):
    (block,) = make_blocks(1, norm_position=position)
    block = block.double()
    initialise(block, 1)
    random_gains(block)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    more = torch.randn_like(x) if extra else None
    expected, _, _ = block(x, SequenceContext.dense(2, 5), None, more)
    state = block.init_state(2, max_tokens=5, device="cpu", dtype=torch.float64)
    for t in range(5):
        ctx = SequenceContext(positions_BT=torch.full((2, 1), t), max_seqlen=1)
        y, state = block.step(x[:, t], ctx, state, more[:, t] if extra else None)
        torch.testing.assert_close(y, expected[:, t], atol=1e-13, rtol=1e-12)


def test_extra_is_read_by_the_mixer_only(make_blocks):
    (block,) = make_blocks(1)
    initialise(block, 1)
    x, more, ctx = torch.randn(2, 5, 16), torch.randn(2, 5, 16), SequenceContext.dense(2, 5)
    mid = x + block.mixer(block.norm1(x + more), ctx)[0]
    expected = mid + block.channel(block.norm2(mid), ctx)[0]
    assert torch.equal(block(x, ctx, None, more)[0], expected)


def test_unknown_norm_position(make_blocks):
    (block,) = make_blocks(1)
    message = r"norm_position: got 'both', expected one of pre, post, peri, sandwich; set"
    with pytest.raises(ValueError, match=message):
        Block(block.mixer, block.channel, lambda: block.norm1, norm_position="both")
