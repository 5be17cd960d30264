"""What is special to Mamba: three implementations of transformers, extreme gates, first values."""

import pytest
import torch
import torch.nn.functional as F
from transformers import JambaConfig, MambaConfig, ZambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer, JambaRMSNorm
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

from llmtrain.context import SequenceContext
from llmtrain.mixers.mamba import Mamba
from llmtrain.model.init import initialise

D, FACTS = 24, {"layer_idx": 0, "n_layers": 2}
# sizes of which no two are equal
KNOBS = {"d_state": 5, "expand": 3, "d_conv": 4, "dt_rank": 7, "init_std": 0.2, "norm_eps": 1e-5}
PUBLISHED = {"dt_limit": (0.0, float("inf"))}
EXTREME = (-3.3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3.3e38)


@pytest.fixture
def float64(monkeypatch):
    """transformers rounds to float32 inside; in float64 that would set the tolerance."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    monkeypatch.setattr(JambaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mixer(**knobs):
    """In float64, with every parameter that starts at a constant moved away from it."""
    made = Mamba(D, **FACTS, **{**KNOBS, **knobs})
    initialise(made, 0)
    made = made.double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter += 0.1 * noise(*parameter.shape, seed=i)
    return made


def mamba():
    sizes = {"state_size": 5, "expand": 3, "conv_kernel": 4, "time_step_rank": 7}
    config = MambaConfig(hidden_size=D, num_hidden_layers=1, **sizes)
    return MambaMixer(config, layer_idx=0), {}


def prefixed(config, **sizes):
    common = {"mamba_d_state": 5, "mamba_expand": 3, "mamba_d_conv": 4, "mamba_dt_rank": 7}
    return config(hidden_size=D, num_hidden_layers=2, **common, **sizes)


def jamba():
    theirs = JambaMambaMixer(prefixed(JambaConfig, rms_norm_eps=1e-5), layer_idx=0)
    norms = {"dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm"}
    return theirs, norms


def zamba():
    config = prefixed(ZambaConfig, n_mamba_heads=4, layers_block_type=["mamba", "mamba"])
    return ZambaMambaMixer(config, layer_idx=0), {}


def copy_weights(theirs, ours, norms):
    """Parameter of theirs -> (ours, the same numbers in their layout, of a value or gradient)."""
    heads, rows = ours.n_heads, ours.d_inner
    alternate = torch.arange(2 * rows).view(2, rows).T.flatten()  # Zamba: x and z in turn
    same = {
        "in_proj.weight": (
            ours.in_proj.weight,
            lambda w: w[alternate] if isinstance(theirs, ZambaMambaMixer) else w,
        ),
        "conv1d.weight": (ours.conv_weight, lambda w: w[:, None]),
        "conv1d.bias": (ours.conv_bias, lambda w: w),
        "out_proj.weight": (ours.out_proj.weight, lambda w: w),
    }
    if isinstance(theirs, ZambaMambaMixer):
        same |= {
            "x_proj_weight": (ours.x_proj, lambda w: w),
            "dt_proj_weight": (ours.dt_proj, lambda w: w),
            "dt_proj_bias": (ours.dt_bias, lambda w: w.view(heads, -1)),
            "A_log": (ours.A_log, lambda w: w.view(heads, -1, w.shape[1])),
            "D": (ours.D, lambda w: w.view(heads, -1)),
        }
    else:
        same |= {
            "x_proj.weight": (ours.x_proj, lambda w: w[0]),
            "dt_proj.weight": (ours.dt_proj, lambda w: w[0]),
            "dt_proj.bias": (ours.dt_bias, lambda w: w),
            "A_log": (ours.A_log, lambda w: w),
            "D": (ours.D, lambda w: w),
        }
    for name, norm in norms.items():
        same[f"{name}.weight"] = (getattr(ours, norm).weight, lambda w: w)
    theirs.load_state_dict({name: layout(value.detach()) for name, (value, layout) in same.items()})
    return same


@pytest.mark.parametrize(
    ("make", "knobs"),
    [(mamba, {}), (jamba, {"inner_norm": True}), (zamba, {"n_heads": 4})],
    ids=["mamba", "jamba", "zamba"],
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_transformers_computes_the_same(make, knobs, backend, float64):
    """Outputs, the input's gradient and every parameter's."""
    ours = mixer(**knobs, **PUBLISHED, backend=backend, chunk=8)
    theirs, norms = make()
    theirs = theirs.double()
    same = copy_weights(theirs, ours, norms)
    x_BTD, weights_BTD = noise(2, 19, D, seed=1).requires_grad_(), noise(2, 19, D, seed=2)
    y_BTD, _ = ours(x_BTD, SequenceContext.dense(2, 19))
    expected_BTD = theirs(x_BTD)
    assert expected_BTD.dtype == torch.float64
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad((y_BTD * weights_BTD).sum(), [x_BTD, *ours.parameters()])
    gradients = {id(p): g for p, g in zip(ours.parameters(), got[1:], strict=True)}
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == same.keys()
    wanted = torch.autograd.grad(
        (expected_BTD * weights_BTD).sum(), [x_BTD, *(parameters[name] for name in same)]
    )
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-9)
    for (name, (value, layout)), gradient in zip(same.items(), wanted[1:], strict=True):
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(layout(gradients[id(value)]), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", EXTREME)
@pytest.mark.parametrize("which", ["step", "output"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_no_gate_makes_a_nan(gate, which, backend):
    """Pre-activations of the time steps, and gates of the output, over bfloat16's range."""
    made = Mamba(D, **FACTS, **KNOBS, bias=True, backend=backend)
    initialise(made, 0)
    with torch.no_grad():
        if which == "step":
            made.dt_bias.fill_(gate)
        else:
            made.in_proj.bias[made.d_inner :] = gate
    x_BTD = noise(2, 40, D).bfloat16().requires_grad_()
    y_BTD, _ = made(x_BTD, SequenceContext.dense(2, 40))
    y_BTD.float().sum().backward()
    assert y_BTD.isfinite().all()
    for tensor in (x_BTD, *made.parameters()):
        assert tensor.grad.isfinite().all()


def test_first_values():
    made = Mamba(64, **FACTS, d_state=8, dt_min=0.01, dt_max=0.02, dt_floor=0.015)
    initialise(made, 0)
    dt_F = F.softplus(made.dt_bias)
    assert 0.0149 < dt_F.min() < 0.0151  # about half of them are raised to the floor
    assert 0.018 < dt_F.max() < 0.0201
    rates_FK = torch.arange(1.0, 9.0).expand(128, 8)
    torch.testing.assert_close(made.A_log.exp().detach(), rates_FK)
    assert made.D.eq(1).all()
    assert made.dt_rank == 4
    assert Mamba(65, **FACTS).dt_rank == 5


def test_steps_stay_within_their_limit():
    made = mixer(dt_limit=(0.02, 0.03))
    dt_BTF, _, _ = made.select(noise(1, 50, made.d_inner))
    assert dt_BTF.min() == 0.02
    assert dt_BTF.max() == 0.03


def test_a_state_belongs_to_rows_of_one_document():
    made = mixer()
    starts_BT = torch.zeros(1, 6, dtype=torch.bool)
    state = made.init_state(1, max_tokens=6, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match="got an initial state together with documents"):
        made(noise(1, 6, D), SequenceContext.packed(starts_BT), state)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dt_rank": 0}, "got dt_rank=0, expected at least 1, or auto"),
        ({"dt_rank": "full"}, "got dt_rank='full', expected at least 1, or auto"),
        ({"d_state": 0}, "got d_state=0, expected at least 1; set mixer.d_state"),
        ({"expand": 0}, "got expand=0, expected at least 1"),
        ({"d_conv": 0}, "got d_conv=0, expected at least 1"),
        ({"chunk": 0}, "got chunk=0, expected at least 1"),
        ({"n_heads": 0}, "got n_heads=0, expected at least 1"),
        ({"n_heads": 5}, r"got n_heads=5, expected a divisor of expand \* d_model = 72"),
        ({"backend": "fast"}, "got backend='fast', expected auto or one of chunked, reference"),
        ({"dt_min": 0.2}, "got dt_min=0.2, dt_max=0.1"),
        ({"dt_floor": 0.0}, ".*dt_floor=0.0, expected"),
        ({"dt_limit": (1.0, 0.5)}, r"got dt_limit=\[1.0, 0.5\], expected \[lowest, highest\]"),
        ({"dt_limit": (1.0,)}, r"got dt_limit=\[1.0\], expected \[lowest, highest\]"),
    ],
)
def test_messages(knobs, message):
    with pytest.raises(ValueError, match=f"mamba: {message}"):
        Mamba(D, **FACTS, **{**KNOBS, **knobs})
