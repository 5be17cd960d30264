import pytest
import torch
from torch import nn

from llmtrain.model import init
from llmtrain.model.embedding import Embedding
from llmtrain.model.init import depth_std, initialise, keyed_seed
from llmtrain.model.linear import Linear
from llmtrain.model.norm import RMSNorm


def test_values_depend_on_name_and_seed_alone(make_model):
    small, large = make_model(2), make_model(4)
    other = make_model(2, tied=False)
    # out projections scale with depth; everything else is the same number for number
    scale = (4 / 2) ** 0.5
    theirs = large.state_dict()
    for name, value in small.state_dict().items():
        factor = scale if name.endswith(("mixer.out.weight", "channel.down.weight")) else 1.0
        torch.testing.assert_close(theirs[name] * factor, value)
        assert torch.equal(other.state_dict()[name], value)


def test_seed_changes_values_and_repeats_them(make_model):
    first, again, second = make_model(seed=1), make_model(seed=1), make_model(seed=2)
    name = "stack.blocks.1.channel.gate_up.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])
    layers = [first.state_dict()[name.replace(".1.", f".{i}.")] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_draw_what_the_global_generator_would(monkeypatch, threads):
    monkeypatch.setattr(init, "threads", lambda: threads)
    parts = [Embedding(8, vocab_size=50), Linear(8, 24, bias=True), Linear(24, 8), RMSNorm(8)]
    parts.append(Linear(8, 24))
    parts[-1].weight = parts[1].weight  # of two modules: the last one's values
    model = nn.Sequential(*parts)
    initialise(model, 3)
    drawn = [parameter.clone() for parameter in model.parameters()]
    for name, module in enumerate(parts):
        torch.manual_seed(keyed_seed(3, str(name)))
        module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn, strict=True))


def test_every_parameter_is_filled_and_random_state_untouched(make_model):
    model = make_model()
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initialise(model, 0)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.isfinite().all() for p in model.parameters())


def test_depth_scaling(make_model):
    model = make_model(8)
    std = torch.cat([b.channel.down.weight.flatten() for b in model.stack.blocks]).std().item()
    torch.testing.assert_close(std, depth_std(0.1, 8), rtol=0.05, atol=0)
    assert depth_std(0.1, 8) == 0.1 / 4


def test_module_without_reset_parameters():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))

    with pytest.raises(TypeError, match=r"1: Bare owns parameters but has no reset_parameters"):
        initialise(nn.Sequential(nn.Linear(2, 2), Bare()), 0)


def test_keyed_seed_is_a_fixed_function():
    assert keyed_seed(0, "a") == keyed_seed(0, "a")
    assert len({keyed_seed(s, n) for s in range(20) for n in ("a", "b", "a.b")}) == 60
    assert all(0 <= keyed_seed(s, "x") < 2**63 for s in range(100))
