import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise
from llmtrain.model.stack import Stack


def test_order_of_a_looped_core(make_blocks):
    stack = Stack(make_blocks(5), prelude=1, coda=2, repeats=3)
    assert stack.order == (0, 1, 2, 1, 2, 1, 2, 3, 4)
    assert len(stack.applications) == 9
    assert Stack(make_blocks(3)).order == (0, 1, 2)
    assert Stack(make_blocks(2), repeats=2).order == (0, 1, 0, 1)


def test_looped_core_equals_the_written_out_model(make_blocks):
    blocks = make_blocks(3)
    looped = Stack(blocks, prelude=1, coda=1, repeats=2)
    initialise(looped, 0)
    written = Stack([blocks[0], blocks[1], blocks[1], blocks[2]])
    x, ctx = torch.randn(2, 4, 16), SequenceContext.dense(2, 4)
    assert torch.equal(looped(x, ctx)[0], written(x, ctx)[0])
    assert sum(p.numel() for p in looped.parameters()) == 3 * sum(
        p.numel() for p in blocks[0].parameters()
    )


def test_each_application_has_a_state_of_its_own(make_blocks):
    stack = Stack(make_blocks(2), prelude=0, coda=1, repeats=3).double()
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
    assert stack.state_bytes(6) == 4 * stack.blocks[0].state_bytes(6)
    assert stack.flops_per_token(6) == 4 * stack.blocks[0].flops_per_token(6)


def test_aux_losses_add_and_metrics_keep_their_layer(make_blocks):
    stack = Stack(make_blocks(2, activation_l1=0.5), repeats=2)
    initialise(stack, 0)
    x, ctx = torch.randn(2, 4, 16), SequenceContext.dense(2, 4)
    _, _, aux = stack(x, ctx)
    metrics = [f"metric/l{i:02d}/sparsity" for i in range(4)]
    assert sorted(aux) == ["loss/activation_l1", *metrics]
    total = 0.0
    for i, block in enumerate(stack.applications):
        x, _, own = block(x, ctx)
        total = total + own["loss/activation_l1"]
        assert aux[metrics[i]] == own["metric/sparsity"]
    torch.testing.assert_close(aux["loss/activation_l1"], total)


def test_recomputation_changes_memory_but_no_gradient(make_blocks):
    stack = Stack(make_blocks(3, activation_l1=0.5), repeats=2).double()
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


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"repeats": 0}, "repeats=0, expected prelude and coda >= 0 and repeats >= 1; set stack"),
        ({"prelude": -1, "repeats": 2}, "got prelude=-1, coda=0, repeats=2, expected"),
        ({"prelude": 1}, "prelude=1 and coda=0 with repeats=1, where they have no effect"),
        ({"prelude": 1, "coda": 2, "repeats": 2}, "leave 0 of 3 blocks to the repeated core"),
    ],
)
def test_errors(make_blocks, knobs, message):
    with pytest.raises(ValueError, match=message):
        Stack(make_blocks(3), **knobs)
