import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.channels.mlp import GeGLU, Gelu, Relu2, SwiGLU
from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise

D, HIDDEN = 12, 20
CTX = SequenceContext.dense(2, 5)
GATED = (SwiGLU, GeGLU)
KINDS = [Gelu, Relu2, *GATED]


def build(kind, **knobs):
    channel = kind(D, layer_idx=0, n_layers=2, hidden=HIDDEN, init_std=0.3, **knobs).double()
    initialise(channel, 0)
    return channel


def random_input():
    torch.manual_seed(0)
    return torch.randn(2, 5, D, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind, bias):
    channel, x = build(kind, bias=bias), random_input()
    with torch.no_grad():
        for name, parameter in channel.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    weights = {name: p.detach() for name, p in channel.named_parameters()}
    first = weights["gate_up.weight" if kind in GATED else "up.weight"]
    hidden = x @ first.T + weights.get("gate_up.bias", weights.get("up.bias", 0))
    if kind in GATED:
        gate, up = hidden[..., :HIDDEN], hidden[..., HIDDEN:]
        normal = 0.5 * (1 + torch.erf(gate / 2**0.5))
        hidden = gate * (torch.sigmoid(gate) if kind is SwiGLU else normal) * up
    elif kind is Relu2:
        hidden = hidden.clamp(min=0) ** 2
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    expected = hidden @ weights["down.weight"].T + weights.get("down.bias", 0)
    torch.testing.assert_close(channel(x, CTX)[0], expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_formula_and_parameters(kind):
    channel = build(kind)
    with FlopCounterMode(display=False) as counter:
        channel(random_input(), CTX)
    assert counter.get_total_flops() == 10 * channel.flops_per_token()
    matrices = 3 if kind in GATED else 2
    assert sum(p.numel() for p in channel.parameters()) == matrices * D * HIDDEN


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    channel, x = build(kind, bias=True), random_input().requires_grad_()
    channel(x, CTX)[0].sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in channel.parameters())
    assert torch.autograd.gradcheck(lambda x: channel(x, CTX)[0], (x[:, :2],))


def test_gelu_forms():
    x = random_input()
    exact, tanh = build(Gelu, approximate="none"), build(Gelu)
    difference = (exact(x, CTX)[0] - tanh(x, CTX)[0]).abs().max()
    assert 0 < difference < 1e-2


def test_activation_l1_is_a_loss_of_the_block():
    x = random_input()
    plain, penalised = build(Relu2), build(Relu2, activation_l1=0.25)
    y, aux = penalised(x, CTX)
    assert torch.equal(y, plain(x, CTX)[0])
    hidden = (x @ penalised.up.weight.T).clamp(min=0) ** 2
    torch.testing.assert_close(aux["loss/activation_l1"], 0.25 * hidden.mean())
    torch.testing.assert_close(aux["metric/sparsity"], (hidden == 0).double().mean())
    assert not aux["metric/sparsity"].requires_grad
    aux["loss/activation_l1"].backward()
    assert penalised.up.weight.grad.abs().sum() > 0
    assert sorted(plain(x, CTX)[1]) == ["metric/sparsity"]


def test_activation_l1_sums_in_float32():
    channel = build(Relu2, activation_l1=1.0).bfloat16()
    _, aux = channel(random_input().bfloat16(), CTX)
    assert aux["loss/activation_l1"].dtype == aux["metric/sparsity"].dtype == torch.float32


def test_activation_l1_makes_units_sparser():
    mean_unit = {}
    for coefficient in (0.0, 10.0):
        channel, x = build(Relu2, activation_l1=coefficient), random_input()
        optimizer = torch.optim.SGD(channel.parameters(), lr=0.05)
        for _ in range(50):
            y, aux = channel(x, CTX)
            loss = (y - x).square().mean() + aux.get("loss/activation_l1", 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean_unit[coefficient] = (channel.up(x).relu().square()).mean().item()
    assert mean_unit[10.0] < mean_unit[0.0] / 2


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (Gelu, {"hidden": 0}, r"hidden: got 0, expected >= 1; set model.ffn_hidden"),
        (SwiGLU, {"hidden": -4}, r"hidden: got -4, expected >= 1; set model.ffn_hidden"),
        (Gelu, {"hidden": 4, "approximate": "erf"}, r"approximate: got 'erf', expected none or"),
        (Relu2, {"hidden": 4, "activation_l1": -1.0}, r"activation_l1: got -1.0, expected >= 0; s"),
    ],
)
def test_errors(kind, knobs, message):
    with pytest.raises(ValueError, match=message):
        kind(D, layer_idx=0, n_layers=1, **knobs)
