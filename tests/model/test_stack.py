import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise
from llmtrain.model.stack import Stack


def test_layers_that_share_a_block_equal_the_written_out_model(make_blocks):
    a, b = make_blocks(2)
    shared = Stack([a, b, a, b, b])
    initialise(shared, 0)
    assert (len(shared.blocks), shared.order) == (2, (0, 1, 0, 1, 1))
    x, ctx = torch.randn(2, 4, 16), SequenceContext.dense(2, 4)
    expected = x
    for block in (a, b, a, b, b):
        expected = block(expected, ctx)[0]
    assert torch.equal(shared(x, ctx)[0], expected)
    count = sum(p.numel() for p in a.parameters())
    assert sum(p.numel() for p in shared.parameters()) == 2 * count


def test_each_application_has_a_state_of_its_own(make_blocks):
    a, b = make_blocks(2)
    stack = Stack([a, a, b, a]).double()
    initialise(stack, 0)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    whole, _, _ = stack(x, SequenceContext.dense(2, 6))
    states = stack.init_state(2, max_tokens=6, device="cpu", dtype=torch.float64)
    assert len(states) == 4
    head, states, _ = stack(x[:, :3], SequenceContext.dense(2, 3), states)
    torch.testing.assert_close(head, whole[:, :3], atol=1e-13, rtol=1e-12)
    assert not torch.equal(states[0]["s"], states[1]["s"])
    for t in range(3, 6):
        ctx = SequenceContext(positions_BT=torch.full((2, 1), t), max_seqlen=1)
        y, states = stack.step(x[:, t], ctx, states)
        torch.testing.assert_close(y, whole[:, t], atol=1e-13, rtol=1e-12)
    assert stack.state_bytes(6) == 4 * a.state_bytes(6)
    assert stack.flops_per_token(6) == 4 * a.flops_per_token(6)


def test_aux_losses_add_and_metrics_keep_their_block(make_blocks):
    a, b = make_blocks(2, activation_l1=0.5)
    stack = Stack([a, b, b])
    initialise(stack, 0)
    x, ctx = torch.randn(2, 4, 16), SequenceContext.dense(2, 4)
    _, _, aux = stack(x, ctx)
    assert sorted(aux) == ["loss/activation_l1", "metric/l00/sparsity", "metric/l01/sparsity"]
    own = []
    for block in (a, b, b):
        x, _, handed_up = block(x, ctx)
        own.append(handed_up)
    total = sum(handed_up["loss/activation_l1"] for handed_up in own)
    torch.testing.assert_close(aux["loss/activation_l1"], total)
    sparsity = [handed_up["metric/sparsity"] for handed_up in own]
    assert aux["metric/l00/sparsity"] == sparsity[0]
    assert sparsity[1] != sparsity[2]
    torch.testing.assert_close(aux["metric/l01/sparsity"], (sparsity[1] + sparsity[2]) / 2)


def test_sums_add_over_the_applications_of_a_block(make_blocks, monkeypatch):
    a, b = make_blocks(2)
    stack = Stack([a, b, b])
    for i, block in enumerate((a, b)):
        handed_up = {"sum/load": torch.tensor([1.0, 10.0**i])}
        forward = block.channel.forward
        monkeypatch.setattr(
            block.channel, "forward", lambda x, ctx, f=forward, h=handed_up: (f(x, ctx)[0], h)
        )
    initialise(stack, 0)
    _, _, aux = stack(torch.randn(2, 4, 16), SequenceContext.dense(2, 4))
    assert {key: value.tolist() for key, value in aux.items()} == {
        "sum/l00/load": [1.0, 1.0],
        "sum/l01/load": [2.0, 20.0],
    }


def test_recomputation_changes_memory_but_no_gradient(make_blocks):
    blocks = make_blocks(3, activation_l1=0.5)
    stack = Stack([*blocks, *blocks]).double()
    initialise(stack, 0)
    ctx = SequenceContext.packed(torch.arange(12).reshape(2, 6) % 5 == 0)

    def run(mode):
        stack.activation_checkpointing = mode
        stack.zero_grad()
        saved = []

        def keep(tensor):
            saved.append(tensor.numel())
            return tensor

        torch.manual_seed(0)
        x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _, aux = stack(x, ctx)
            (y.square().sum() + aux["loss/activation_l1"]).backward()
        return sum(saved), [x.grad, *(p.grad for p in stack.parameters())]

    plain_saved, plain = run("none")
    full_saved, full = run("full")
    assert all(torch.equal(a, b) for a, b in zip(plain, full, strict=True))
    assert full_saved < plain_saved / 4


@pytest.mark.parametrize("knobs", [{"repeats": 2}, {"exit_threshold": 0.1}])
def test_layers_applied_once_take_no_other_depth(make_blocks, knobs):
    stack = Stack(make_blocks(2))
    stack.set_depth()
    name = next(iter(knobs))
    with pytest.raises(ValueError, match=rf"{name}: got .* applied once, expected null"):
        stack.set_depth(**knobs)
