import math

import pytest
import torch
import torch.nn.functional as F

from llmtrain.context import SequenceContext
from llmtrain.objectives.causal import Causal, TokenLoss

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
TARGETS = torch.tensor([[1, 4, 1, 5, 9, 0], [6, 5, 3, 5, 8, 0]])
WEIGHTS = torch.tensor([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 0.5, 0, 0]])
CTX = SequenceContext.dense(2, 6)


def run(objective, model):
    model.zero_grad()
    out = objective(model, TOKENS, TARGETS, WEIGHTS, CTX)
    out.loss_sum.backward()
    return out, [p.grad.clone() for p in model.parameters()]


def test_definition(make_model):
    model = make_model()
    out, grads = run(Causal(), model)
    logits = model.logits(model(TOKENS, CTX).hidden_BTD)
    log_p = logits.log_softmax(-1).gather(-1, TARGETS[..., None])[..., 0]
    expected = -(WEIGHTS * log_p).sum()
    torch.testing.assert_close(out.loss_sum, expected)
    torch.testing.assert_close(out.ce_sum, expected.detach())
    assert out.weight_sum == 9.5
    assert out.aux == {}
    assert not out.ce_sum.requires_grad
    for got, want in zip(grads, torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(got, want)


def test_z_loss(make_model):
    model = make_model()
    plain, _ = run(Causal(), model)
    out, _ = run(Causal(z_loss=0.1), model)
    lse = model.logits(model(TOKENS, CTX).hidden_BTD).logsumexp(-1)
    extra = 0.1 * (WEIGHTS * lse.square()).sum()
    torch.testing.assert_close(out.loss_sum, plain.loss_sum + extra)
    torch.testing.assert_close(out.ce_sum, plain.ce_sum)
    torch.testing.assert_close(out.aux["metric/z_loss"], extra.detach() / 9.5)


def test_losses_of_blocks_are_weighted_like_tokens(make_model):
    model = make_model(activation_l1=0.5)
    out, grads = run(Causal(), model)
    aux = model(TOKENS, CTX).aux
    assert aux["loss/activation_l1"] > 0
    torch.testing.assert_close(out.loss_sum, out.ce_sum + 9.5 * aux["loss/activation_l1"])
    assert sorted(out.aux) == sorted(aux)
    free = make_model(activation_l1=0.0)
    _, without = run(Causal(), free)
    names = [name for name, _ in model.named_parameters()]
    up = names.index("stack.blocks.0.channel.up.weight")
    assert not torch.allclose(grads[up], without[up])


def test_two_halves_add_to_the_whole(make_model):
    """The sums are over tokens, so that ranks and micro-batches can be added."""
    model, objective = make_model(), Causal(z_loss=1e-2)
    whole, grads = run(objective, model)
    model.zero_grad()
    parts = [
        objective(model, TOKENS[i], TARGETS[i], WEIGHTS[i], SequenceContext.dense(1, 6))
        for i in (slice(0, 1), slice(1, 2))
    ]
    for part in parts:
        part.loss_sum.backward()
    for name in ("loss_sum", "ce_sum", "weight_sum"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name))
    for parameter, expected in zip(model.parameters(), grads):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_change_memory_but_no_number(make_model, chunk_tokens, tied):
    model = make_model(tied=tied, activation_l1=0.5)
    whole, grads = run(Causal(z_loss=1e-2), model)
    out, chunked = run(Causal(z_loss=1e-2, chunk_tokens=chunk_tokens), model)
    expected = (whole.loss_sum, whole.ce_sum, *grads)
    for got, want in zip((out.loss_sum, out.ce_sum, *chunked), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


def saved_elements(make_model, chunk_tokens):
    """Elements kept for the backward pass of the head and the loss, all logits being 12 x 19."""
    model = make_model()
    hidden = model(TOKENS, CTX).hidden_BTD.detach().requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    class Head(torch.nn.Module):
        def forward(self, tokens_BT, ctx):
            return hidden, None, {}

        def logits(self, hidden_ND):
            return model.logits(hidden_ND)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Causal(chunk_tokens=chunk_tokens)(Head(), TOKENS, TARGETS, WEIGHTS, CTX)
    return max(kept)


def test_chunks_keep_no_logits(make_model):
    assert saved_elements(make_model, None) >= 12 * 19
    assert saved_elements(make_model, 3) < 12 * 19


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = (8 * torch.randn(64, 500)).bfloat16()
    targets, weights = torch.randint(500, (64,)), torch.ones(64)
    ce_sum, lse_sum = TokenLoss(z_loss=1.0)(logits, targets, weights)
    assert ce_sum.dtype == lse_sum.dtype == torch.float32
    exact = F.cross_entropy(logits.double(), targets, reduction="sum")
    torch.testing.assert_close(ce_sum.double(), exact, rtol=1e-6, atol=0)


def test_uniform_model_has_the_loss_of_a_coin_with_o_sides(make_model):
    model = make_model()
    with torch.no_grad():
        model.embedding.weight.zero_()
    out, _ = run(Causal(), model)
    torch.testing.assert_close(out.ce_sum.item() / 9.5, math.log(19))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"z_loss": -1e-4}, r"z_loss: got -0.0001, expected >= 0; set objective.z_loss"),
        ({"chunk_tokens": 0}, r"chunk_tokens: got 0, expected >= 1 or null; set objective.chunk"),
    ],
)
def test_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        Causal(**knobs)
