"""What is special to sLSTM: first values, projections by blocks, compilation, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llmtrain.context import SequenceContext
from llmtrain.mixers.slstm import SLSTM, BlockLinear
from llmtrain.model.init import initialise

D, HEADS = 32, 4


def mixer(layer_idx=1, n_layers=4, **knobs):
    made = SLSTM(D, layer_idx=layer_idx, n_layers=n_layers, **{"n_heads": HEADS, **knobs})
    initialise(made, 0)
    return made


def test_first_values_are_those_published():
    """Forget gates from 5 down to -7 in every head; the exponent grows from 0.3 to 1.6."""
    for layer, exponent in ((0, 0.3), (3, 1.6)):
        z, i, f, o = mixer(layer).gate_bias.unflatten(1, (4, D // HEADS)).unbind(dim=1)
        assert not torch.stack([z, i, o]).any()
        expected = [5 - 12 * (j / 7) ** exponent for j in range(8)]
        torch.testing.assert_close(f, torch.tensor([expected] * HEADS))
    assert not mixer().recurrent.any()
    assert mixer(recurrent_init_std=0.2).recurrent.std().item() == pytest.approx(0.2, rel=0.1)
    assert mixer(n_layers=1, layer_idx=0, n_heads=D).gate_bias.isfinite().all()  # V = 1


def test_block_linear_is_a_block_diagonal_matrix():
    layer = BlockLinear(6, 12, blocks=3, init_std=1.0)
    layer.reset_parameters()
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight).T)


def test_a_head_depends_on_its_own_channels_alone():
    """All projections, recurrent weights and norms stay within a head."""
    made, x_BTD = mixer(recurrent_init_std=0.5), torch.randn(1, 6, D)
    other_BTD = x_BTD.clone()
    other_BTD[:, 2, : D // HEADS] += 1.0
    ctx = SequenceContext.dense(1, 6)
    same = (made(x_BTD, ctx)[0] == made(other_BTD, ctx)[0]).unflatten(2, (HEADS, -1)).all(dim=-1)
    assert same[:, :2].all()
    assert not same[:, 2:, 0].any()
    assert same[:, :, 1:].all()


def test_gates_see_the_last_output():
    """With recurrent weights the order of tokens matters beyond what gates of x alone can tell."""
    x_BTD, ctx = torch.randn(1, 6, D), SequenceContext.dense(1, 6)
    made = mixer()
    before = made(x_BTD, ctx)[0]
    with torch.no_grad():
        made.recurrent.add_(0.3)
    after = made(x_BTD, ctx)[0]
    assert before[:, :1].equal(after[:, :1])  # h before the first token is zero
    assert not before[:, 1:].equal(after[:, 1:])


def test_gradients_under_checkpointing():
    made, x_BTD = mixer(recurrent_init_std=0.3), torch.randn(2, 20, D)
    ctx = SequenceContext.packed(torch.arange(20).expand(2, 20) % 7 == 0)
    results = []
    for recompute in (False, True):
        made.zero_grad()
        if recompute:
            y_BTD = checkpoint(lambda x: made(x, ctx)[0], x_BTD, use_reentrant=False)
        else:
            y_BTD = made(x_BTD, ctx)[0]
        y_BTD.square().sum().backward()
        results.append([p.grad.clone() for p in made.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@torch.no_grad()
def test_state_in_bfloat16():
    """The memory stays float32 whatever dtype is asked for; the convolution's inputs take it."""
    made = mixer()
    state = made.init_state(2, max_tokens=8, device="cpu", dtype=torch.bfloat16)
    dtypes = {name: z.dtype for name, z in state.items()}
    assert dtypes.pop("conv") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    _, after = made(torch.randn(2, 5, D).bfloat16(), SequenceContext.dense(2, 5), state)
    assert {name: z.dtype for name, z in after.items()} == {n: z.dtype for n, z in state.items()}


def test_what_does_not_decay():
    assert set(mixer().no_weight_decay) == {"gate_bias"}


def test_kept_bytes_follow_a_backend_that_is_named():
    """auto counts as the loop: what runs is known only where it runs."""
    kept = {
        backend: mixer(backend=backend).kept_bytes(torch.bfloat16, compiled=True)
        for backend in ("auto", "loop", "triton")
    }
    assert kept["auto"] == kept["loop"] == kept["triton"] + 4 * D


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_heads": 0}, "slstm: got n_heads=0, expected at least 1; set mixer.n_heads"),
        ({"n_heads": 5}, "slstm: got d_model=32 and n_heads=5, expected a multiple"),
        ({"d_conv": 1}, "slstm: got d_conv=1, expected at least 2, or null for no convolution"),
        ({"forget_gate": "relu"}, "slstm: got forget_gate='relu', expected one of sigmoid, exp"),
        (
            {"backend": "chunked"},
            "slstm: got backend='chunked', expected auto or one of triton, loop",
        ),
        ({"head_norm": "batch"}, "head_norm: got 'batch', expected one of layernorm, rmsnorm"),
    ],
)
def test_messages(knobs, message):
    with pytest.raises(ValueError, match=message):
        mixer(**knobs)


def test_the_backend_is_known_before_the_start():
    facts = {"device": torch.device("cpu"), "dtype": torch.float32, "tokens": 8, "documents": True}
    assert mixer().kernel_backend(**facts) == "loop"
    assert mixer(backend="reference").kernel_backend(**facts) == "reference"
