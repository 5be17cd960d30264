"""What is special to Gated DeltaNet; its equality with transformers is in tests/export."""

import pytest
import torch

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.mixers.gated_deltanet import GatedDeltaNet
from llmtrain.model.init import initialise

FACTS = {"layer_idx": 0, "n_layers": 2}


def make(d_model=32, dtype=torch.float64, *, n_heads=2, **knobs):
    mixer = GatedDeltaNet(d_model, n_heads=n_heads, **FACTS, **{"init_std": 0.3, **knobs})
    initialise(mixer, 0)
    return mixer.to(dtype)


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_sizes_of_heads():
    mixer = make(n_v_heads=6)
    assert (mixer.head_dim, mixer.v_width) == (12, 24)  # 3/4 of the width in two heads, and twice
    assert mixer.init_state(1, max_tokens=9, device="cpu", dtype=torch.bfloat16)["s"].shape == (
        1,
        6,
        12,
        24,
    )
    mixer = make(head_dim=5, expand_k=None, expand_v=1.2)
    assert (mixer.head_dim, mixer.v_width) == (5, 6)


def test_published_1_3b():
    """The preset's count by hand: keys 9 x 200, values 9 x 400, 5888 hidden units, tied head."""
    config = compose("train", ["experiment=gated_deltanet_1_3b"])
    model = build.build_model(config, vocab_size=32000, device="meta")
    D, G, H, K, V, W, F = 2400, 9, 9, 200, 400, 4, 5888
    projections = D * (2 * G * K + H * V) + D * H * V + 2 * D * H + H * V * D
    mixer = projections + W * (2 * G * K + H * V) + 2 * H + V
    layers = 16 * (mixer + 3 * D * F + 2 * D)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == layers + D + 32000 * D
    assert round(count / 1e9, 1) == 1.3
    assert model.stack.blocks[0].mixer.state_bytes(4096) == 4 * H * K * V + 2 * 3 * 7200


def test_first_values():
    """Decays of all kinds: softplus(dt_bias) and exp(A_log) spread over their ranges."""
    mixer = make(256, n_heads=64, dtype=torch.float32, head_dim=4, expand_k=None)
    dt_H, rate_H = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    for values_H, low, high in ((dt_H, 0.001, 0.1), (rate_H, 0.01, 16.0)):
        assert values_H.min() > 0.999 * low
        assert values_H.max() < 1.001 * high
    assert dt_H.log().std() > 1  # 4.6 / sqrt(12) = 1.3
    assert rate_H.std() > 3  # 16 / sqrt(12) = 4.6


def test_a_negated_key_flips_the_state():
    """beta = 2 with one unit key again and again: the state's part along it changes sign, which
    no eigenvalue above 0 can do."""
    mixer = make(4, n_heads=1, head_dim=1, expand_k=None, expand_v=2.0, d_conv=1)
    negative = make(
        4, n_heads=1, head_dim=1, expand_k=None, expand_v=2.0, d_conv=1, allow_neg_eigval=True
    )
    x_BTD = noise(1, 1, 4).expand(1, 6, 4)
    for layer, sign in ((mixer, 1), (negative, -1)):
        with torch.no_grad():
            layer.b_proj.weight.copy_(30 * x_BTD[0, :1])  # beta near its largest
            layer.dt_bias.fill_(-30.0)  # no decay
            layer.qkv_proj.weight[2:].zero_()  # no values: only the first state moves
        state = layer.init_state(1, max_tokens=6, device="cpu", dtype=torch.float64)
        state["s"] += 1.0
        signs = []
        for t in range(3):
            _, state = layer.step(x_BTD[:, t], SequenceContext.dense(1, 1), state)
            signs.append(state["s"].sign().unique().tolist() if sign < 0 else None)
            if sign > 0:
                assert state["s"].abs().max() < 1e-3  # forgotten, not negated
        if sign < 0:
            assert signs == [[-1.0], [1.0], [-1.0]]


class Given(torch.nn.Module):
    """A projection that returns what it was given."""

    def __init__(self, *shape, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        extremes = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38]).bfloat16()
        self.value = torch.nn.Parameter(extremes[torch.randint(7, shape, generator=generator)])

    def forward(self, x_BTD):
        return self.value


@pytest.mark.parametrize("decay", [True, False])
def test_gates_of_any_size(decay):
    """Betas, decays and output gates from all over bfloat16's range: no NaN, no infinity."""
    mixer = make(16, dtype=torch.float32, chunk=8, decay=decay, allow_neg_eigval=True)
    mixer.b_proj = Given(2, 40, 2, seed=1)
    mixer.z_proj = Given(2, 40, 24, seed=2)
    if decay:
        mixer.a_proj = Given(2, 40, 2, seed=3)
    x_BTD = noise(2, 40, 16).bfloat16().requires_grad_()
    y_BTD, _ = mixer(x_BTD, SequenceContext.dense(2, 40))
    assert y_BTD.isfinite().all()
    names = [name for name, _ in mixer.named_parameters()]
    found = torch.autograd.grad(y_BTD.float().mean(), [x_BTD, *mixer.parameters()])
    for name, gradient in zip(["x", *names], found, strict=True):
        assert gradient.isfinite().all(), name


@torch.no_grad()
def test_long_rows_in_bfloat16():
    """4096 tokens: the error of a layer does not grow along the row."""
    knobs = {"head_dim": 16, "expand_k": None, "expand_v": 1.0, "allow_neg_eigval": True}
    exact, low = make(**knobs), make(dtype=torch.float32, **knobs)
    x_BTD = noise(1, 4096, 32)
    ctx = SequenceContext.dense(1, 4096)
    y_BTD = exact(x_BTD, ctx)[0]
    error_BTD = low(x_BTD.bfloat16(), ctx)[0].double() - y_BTD
    for part in (slice(0, 512), slice(-512, None)):
        assert error_BTD[:, part].norm() / y_BTD[:, part].norm() < 0.02


def test_backend_in_use():
    where = {"device": torch.device("cpu"), "dtype": torch.float32, "tokens": 64}
    assert make().kernel_backend(documents=False, **where) == "chunked"
    assert make(backend="reference").kernel_backend(documents=True, **where) == "reference"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_heads": 0}, r"n_heads=0 and n_v_heads=0, expected positive numbers"),
        ({"n_heads": 4, "n_v_heads": 6}, r"n_heads=4 and n_v_heads=6, .*dividing the second"),
        ({"n_heads": 5}, r"expand_k=0.75 and n_heads=5 for d_model=32, .*not 4.8; set mixer.n_h"),
        ({"head_dim": 8}, r"head_dim=8 and expand_k=0.75, expected one of them"),
        ({"expand_k": None}, r"head_dim=None and expand_k=None, expected one of them"),
        ({"head_dim": 0, "expand_k": None}, r"head_dim=0, expected at least 1"),
        ({"expand_v": 1.3}, r"expand_v=1.3 for key heads of 12, .*not 15.6; set mixer.expand_v"),
        ({"d_conv": 0}, r"d_conv=0, expected at least 1"),
        ({"chunk": 24}, r"chunk=24, expected a power of two"),
        ({"backend": "triton"}, r"backend='triton', expected auto or one of chunked, reference"),
        ({"dt_min": 0.2}, r"dt_min=0.2 and dt_max=0.1, expected 0 < dt_min <= dt_max"),
        ({"decay": False, "dt_max": 0.2}, r"dt_min=0.001, dt_max=0.2 and A_.*decay=false, where"),
        ({"A_range": [0.0, 1.0]}, r"A_range=\[0.0, 1.0\], expected \[lowest, highest\]"),
    ],
)
def test_knobs_that_do_not_fit(knobs, message):
    with pytest.raises(ValueError, match=f"gated_deltanet: got {message}"):
        make(**knobs)


def test_a_state_of_packed_rows_is_refused():
    mixer = make()
    ctx = SequenceContext.packed(torch.tensor([[True, False, True, False]]))
    state = mixer.init_state(1, max_tokens=4, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match="initial state together with documents"):
        mixer(noise(1, 4, 32), ctx, state)
