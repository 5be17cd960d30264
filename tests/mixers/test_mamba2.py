"""What is special to Mamba-2: extreme gates, first values, the gated norm, messages."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.context import SequenceContext
from llmtrain.mixers.mamba2 import Mamba2
from llmtrain.model.init import initialise
from llmtrain.model.norm import GatedRMSNorm

D, FACTS = 24, {"layer_idx": 0, "n_layers": 2}
KNOBS = {"d_state": 10, "head_dim": 6, "n_groups": 4, "init_std": 0.2}
EXTREME = (-3.3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3.3e38)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("gate", EXTREME)
@pytest.mark.parametrize("which", ["step", "output"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_gate_makes_a_nan(gate, which, before, backend):
    """Pre-activations of the time steps, and gates of the output, over bfloat16's range."""
    made = Mamba2(D, **FACTS, **KNOBS, bias=True, norm_before_gate=before, backend=backend)
    initialise(made, 0)
    with torch.no_grad():
        if which == "step":
            made.in_proj.bias[-made.n_heads :] = gate
        else:
            made.in_proj.bias[: made.d_inner] = gate
    x_BTD = noise(2, 80, D).bfloat16().requires_grad_()
    y_BTD, _ = made(x_BTD, SequenceContext.dense(2, 80))
    y_BTD.float().sum().backward()
    assert y_BTD.isfinite().all()
    for tensor in (x_BTD, *made.parameters()):
        assert tensor.grad.isfinite().all()


def test_first_values():
    made = Mamba2(
        64, **FACTS, head_dim=1, dt_min=0.01, dt_max=0.02, dt_floor=0.015, A_range=(2.0, 3.0)
    )
    initialise(made, 0)
    dt_H, rates_H = F.softplus(made.dt_bias), made.A_log.exp()
    assert 0.0149 < dt_H.min() < 0.0151  # about half of them are raised to the floor
    assert 0.018 < dt_H.max() < 0.0201
    assert 2.0 < rates_H.min() < 2.2
    assert 2.8 < rates_H.max() < 3.0
    assert made.D.eq(1).all()


def test_steps_stay_within_their_limit():
    made = Mamba2(D, **FACTS, **KNOBS, dt_limit=(0.02, 0.03))
    initialise(made, 0)
    dt_BTH = made.time_steps(10 * noise(1, 50, made.n_heads).float())
    assert dt_BTH.min() == torch.tensor(0.02)
    assert dt_BTH.max() == torch.tensor(0.03)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(before, groups):
    """Each group of the gated channels, or of those to be gated, has a mean square of one."""
    norm = GatedRMSNorm(12, groups=groups, before_gate=before, eps=0.0).double()
    y_BTF, z_BTF = noise(2, 5, 12), noise(2, 5, 12, seed=1)
    with torch.no_grad():
        norm.weight.copy_(noise(12, seed=2))
    out_BTF = norm(y_BTF, z_BTF) / norm.weight
    gate_BTF = z_BTF * torch.sigmoid(z_BTF)
    plain_BTF = out_BTF / gate_BTF if before else out_BTF
    squares = plain_BTF.unflatten(-1, (groups, -1)).square().mean(-1)
    torch.testing.assert_close(squares, torch.ones_like(squares))
    source_BTF = y_BTF if before else y_BTF * gate_BTF
    cosine = F.cosine_similarity(
        plain_BTF.unflatten(-1, (groups, -1)), source_BTF.unflatten(-1, (groups, -1)), dim=-1
    )
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_a_state_belongs_to_rows_of_one_document():
    made = Mamba2(D, **FACTS, **KNOBS)
    initialise(made, 0)
    starts_BT = torch.zeros(1, 6, dtype=torch.bool)
    state = made.init_state(1, max_tokens=6, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="got an initial state together with documents"):
        made(noise(1, 6, D).float(), SequenceContext.packed(starts_BT), state)


@pytest.mark.parametrize("tokens", [1, 2, 500])
def test_low_precision_decoding_keeps_the_state_in_float32(tokens):
    made = Mamba2(D, **FACTS, **KNOBS)
    state = made.init_state(3, max_tokens=tokens, device="cpu", dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "conv": torch.bfloat16,
        "ssm": torch.float32,
    }
    assert made.state_bytes(tokens) == 2 * 3 * (48 + 2 * 4 * 10) + 4 * 48 * 10


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"d_state": 0}, "got d_state=0, expected at least 1; set mixer.d_state"),
        ({"n_groups": 0}, "got n_groups=0, expected at least 1"),
        ({"head_dim": 0}, "got head_dim=0, expected at least 1"),
        ({"d_conv": 0}, "got d_conv=0, expected at least 1"),
        ({"norm_groups": 0}, "got norm_groups=0, expected at least 1"),
        ({"chunk": 0}, "got chunk=0, expected at least 1"),
        ({"expand": 0}, r"got expand \* d_model = 0 and head_dim=6"),
        ({"head_dim": 5}, r"got expand \* d_model = 48 and head_dim=5, expected a positive mul"),
        ({"n_groups": 3}, r"got 8 heads .* and n_groups=3, expected a divisor of the heads"),
        ({"norm_groups": 5}, r"got norm_groups=5, expected a divisor of expand \* d_model = 48"),
        ({"backend": "fast"}, "got backend='fast', expected auto or one of chunked, reference"),
        ({"dt_min": 0.2}, "got dt_min=0.2, dt_max=0.1"),
        ({"dt_floor": 0.0}, ".*dt_floor=0.0, expected"),
        ({"dt_limit": (1.0, 0.5)}, r"got dt_limit=\[1.0, 0.5\], expected \[lowest, highest\]"),
        ({"dt_limit": (1.0,)}, r"got dt_limit=\[1.0\], expected \[lowest, highest\]"),
        ({"A_range": (0.0, 1.0)}, r"got A_range=\[0.0, 1.0\], expected \[lowest, highest\]"),
    ],
)
def test_messages(knobs, message):
    with pytest.raises(ValueError, match=f"mamba2: {message}"):
        Mamba2(D, **FACTS, **{**KNOBS, **knobs})
