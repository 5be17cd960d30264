"""What a model and its export must have in common, whatever the family."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llmtrain.context import SequenceContext
from llmtrain.generate import generate
from llmtrain.objectives.causal import Causal


@pytest.fixture
def random_tokens():
    def make(rows=3, length=21, vocab=50):
        return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def shuffle_norms():
    """shuffle_norms(model): gains of one would hide a norm in the wrong place."""

    def shuffle(model):
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model

    return shuffle


@pytest.fixture
def float64_norm(monkeypatch):
    """float64_norm(cls): an RMSNorm of transformers without its rounding to float32 inside, which
    would set the tolerance."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    return lambda cls: monkeypatch.setattr(cls, "forward", forward)


@pytest.fixture
def same_function(random_tokens):
    """same_function(model, theirs, weights, **close): logits, loss and every gradient agree.

    weights: the export's map from a model to the values of their names; of the gradients' names,
    those that are no parameter of theirs must be buffers.
    """

    def check(model, theirs, weights, **close):
        tokens = random_tokens()
        ctx = SequenceContext.dense(*tokens.shape)
        their_logits = theirs(tokens).logits
        torch.testing.assert_close(
            model.logits(model(tokens, ctx).hidden_BTD), their_logits, **close
        )
        weights_BT = torch.ones(tokens.shape, dtype=torch.float64)
        weights_BT[:, -1] = 0
        out = Causal()(model, tokens, tokens.roll(-1, dims=1), weights_BT, ctx)
        loss = out.loss_sum / out.weight_sum
        their_loss = F.cross_entropy(their_logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(loss, their_loss, **close)

        loss.backward()
        their_loss.backward()
        gradients = copy.deepcopy(model)
        for parameter, ours in zip(gradients.parameters(), model.parameters(), strict=True):
            parameter.data = ours.grad
        ours, expected = weights(gradients), dict(theirs.named_parameters())
        buffers = dict(theirs.named_buffers())
        assert sorted(set(ours) - set(buffers)) == sorted(expected)
        for name, parameter in expected.items():
            assert ours[name].abs().max() > 1e-5, name
            torch.testing.assert_close(ours[name], parameter.grad, **close)

    return check


@pytest.fixture
def same_greedy_text(random_tokens):
    """same_greedy_text(model, theirs): 20 tokens after prompts of different lengths, token for
    token; ours by one cached step after another, theirs by their own generate."""

    def check(model, theirs, new=20):
        prompts = [random_tokens(1, n)[0].tolist() for n in (1, 7, 3, 7)]
        ours = generate(model, prompts, max_new_tokens=new)
        for prompt, text in zip(prompts, ours, strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert text == expected[0, len(prompt) :].tolist()
        assert len({tuple(text) for text in ours}) > 1

    return check
