import copy

import pytest
import torch

from llmtrain.model.embedding import Embedding, TiedHead


def test_scale_multiplies_the_lookup_only():
    plain, scaled = Embedding(8, vocab_size=5), Embedding(8, vocab_size=5, scale=3.0)
    plain.reset_parameters()
    scaled.load_state_dict(plain.state_dict())
    tokens = torch.tensor([[4, 0, 2]])
    torch.testing.assert_close(scaled(tokens), 3 * plain.weight[tokens])
    hidden = torch.randn(1, 3, 8)
    assert torch.equal(TiedHead(scaled)(hidden), TiedHead(plain)(hidden))


def test_first_logits_have_unit_deviation_at_any_width():
    for width in (64, 512):
        embedding = Embedding(width, vocab_size=400)
        embedding.reset_parameters()
        hidden = torch.nn.functional.rms_norm(torch.randn(50, width), (width,))
        torch.testing.assert_close(TiedHead(embedding)(hidden).std().item(), 1.0, rtol=0.05, atol=0)
    fixed = Embedding(512, vocab_size=400, init_std=0.02)
    fixed.reset_parameters()
    torch.testing.assert_close(fixed.weight.std().item(), 0.02, rtol=0.02, atol=0)


def test_tied_weight_has_one_owner_and_both_gradients(make_model):
    model = make_model(tied=True)
    names = [n for n, _ in model.named_parameters() if "embedding" in n or "head" in n]
    assert names == ["embedding.weight"]
    assert [k for k in model.state_dict() if "embedding" in k or "head" in k] == names
    hidden = torch.randn(1, 4, 16, dtype=torch.float64)
    model.head(hidden).sum().backward()
    # the head alone reaches every row, also rows that were never looked up
    torch.testing.assert_close(model.embedding.weight.grad, hidden.sum((0, 1)).expand(24, 16))


def test_stays_tied_through_moves_and_copies(make_model):
    model = make_model(tied=True)
    hidden = torch.randn(1, 4, 16)
    for moved in (
        copy.deepcopy(model).float(),
        copy.deepcopy(model).to("meta").to_empty(device="cpu"),
    ):
        moved = moved.float()
        with torch.no_grad():
            moved.embedding.weight.fill_(0.5)
        torch.testing.assert_close(moved.head(hidden)[..., 0], 0.5 * hidden.sum(-1))


def test_untied_head_is_its_own_parameter(make_model):
    model = make_model(tied=False)
    assert model.head.weight.shape == model.embedding.weight.shape == (24, 16)
    assert not torch.equal(model.head.weight, model.embedding.weight)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_logits_are_soft_capped(build_model, tied):
    """In float32 whatever the compute dtype, and in steps and losses too."""
    changes = ("model.n_layers=1", f"model.tie_embeddings={tied}", "embedding.init_std=1.0")
    plain = build_model(*changes)
    capped = build_model(*changes, "embedding.logit_softcap=3.0")
    hidden = torch.randn(2, 5, plain.embedding.weight.shape[1], dtype=torch.float64)
    expected = 3 * (plain.logits(hidden) / 3).tanh()
    assert (expected.abs() > 2.9).any()  # where the cap bites
    torch.testing.assert_close(capped.logits(hidden), expected)
    low = build_model(*changes, "embedding.logit_softcap=3.0", dtype=torch.bfloat16)
    assert low.logits(hidden.bfloat16()).dtype == torch.float32
    tokens = torch.tensor([1, 2])
    logits, _ = capped.step(tokens, capped.init_state(2, max_tokens=4))
    uncapped, _ = plain.step(tokens, plain.init_state(2, max_tokens=4))
    torch.testing.assert_close(logits, 3 * (uncapped / 3).tanh())


def test_a_cap_is_positive():
    with pytest.raises(ValueError, match=r"embedding: got logit_softcap=0, expected a positive"):
        Embedding(8, vocab_size=5, logit_softcap=0)
