"""What is special to mLSTM: first values, gates in float32, knobs and their messages."""

import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.mixers.mlstm import MLSTM
from llmtrain.model.init import initialise

FACTS = {"layer_idx": 1, "n_layers": 4, "n_heads": 4}


def mixer(d_model=32, **knobs):
    made = MLSTM(d_model, **{**FACTS, **knobs})
    initialise(made, 0)
    return made


def test_first_values_are_those_published():
    made = mixer()
    assert made.gate_bias.tolist() == [-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]
    assert not made.gate_proj.weight.any()
    other = mixer(input_gate_bias=-2.0, forget_gate_bias=[1.0, 1.0], gate_init_std=0.3)
    assert other.gate_bias.tolist() == [-2.0] * 4 + [1.0] * 4
    assert other.gate_proj.weight.std().item() == pytest.approx(0.3, rel=0.2)


def test_gates_see_more_than_bfloat16_of_their_bias():
    """What the weights add to a bias of -10 is not rounded to its steps of 1/16."""
    made = mixer(gate_init_std=0.01, gate_soft_cap=None)
    x_BTD = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, exact = made.gates(x_BTD), made.double().gates(x_BTD.double())
    assert low.dtype == torch.float32
    assert (exact - exact.mean(dim=1, keepdim=True)).abs().max() > 0.05  # something to see
    assert (low - exact).abs().max() < 1e-3


def test_soft_cap():
    made, x_BTD = mixer(gate_init_std=1.0), torch.randn(1, 50, 32)
    plain = mixer(gate_init_std=1.0, gate_soft_cap=None).gates(x_BTD)
    assert plain.abs().max() > 15
    torch.testing.assert_close(made.gates(x_BTD), 15 * (plain / 15).tanh())


@torch.no_grad()
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_state_in_bfloat16(input_gate):
    """The memory stays float32 whatever dtype is asked for; the convolution's inputs take it."""
    made = mixer(input_gate=input_gate, d_conv=4)
    state = made.init_state(2, max_tokens=8, device="cpu", dtype=torch.bfloat16)
    dtypes = {name: z.dtype for name, z in state.items()}
    assert dtypes.pop("conv") == torch.bfloat16
    assert set(dtypes) == ({"C", "n", "m"} if input_gate == "exp" else {"C"})
    assert set(dtypes.values()) == {torch.float32}
    _, after = made(torch.randn(2, 5, 32).bfloat16(), SequenceContext.dense(2, 5), state)
    assert {name: z.dtype for name, z in after.items()} == {n: z.dtype for n, z in state.items()}


def test_a_state_and_documents_do_not_go_together():
    made = mixer()
    starts_BT = torch.tensor([[True, False, True]])
    state = made.init_state(1, max_tokens=8, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mlstm: got an initial state together with documents"):
        made(torch.randn(1, 3, 32), SequenceContext.packed(starts_BT), state)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"input_gate": "relu"}, "mlstm: got input_gate='relu', expected one of exp, sigmoid; set"),
        ({"gate_soft_cap": 0}, "mlstm: got gate_soft_cap=0, expected a positive number or null"),
        ({"d_conv": 1}, "mlstm: got d_conv=1, expected at least 2, or null for no convolution"),
        ({"forget_gate_bias": [3.0]}, r"mlstm: got forget_gate_bias=\[3.0\], expected two numbers"),
        ({"n_heads": 0}, r"mlstm: got n_heads=0, expected at least 1; set mixer.n_heads"),
        ({"chunk": 0}, r"mlstm: got chunk=0, expected at least 1; set mixer.chunk"),
        ({"backend": "triton"}, "mlstm: got backend='triton', expected auto or one of chunked"),
        ({"head_norm": "batch"}, "head_norm: got 'batch', expected one of layernorm, rmsnorm"),
        (
            {"qk_dim_factor": 0.6},
            r"mlstm: got a width of 19 \(d_model=32 x qk_dim_factor=0.6\) for n_heads=4, expected",
        ),
        ({"v_dim_factor": 0.0}, r"mlstm: got a width of 0 \(d_model=32 x v_dim_factor=0.0\)"),
    ],
)
def test_messages(knobs, message):
    with pytest.raises(ValueError, match=message):
        mixer(**knobs)


def test_the_backend_is_known_before_the_start():
    facts = {"device": torch.device("cpu"), "dtype": torch.float32, "tokens": 8, "documents": True}
    assert mixer().kernel_backend(**facts) == "chunked"
    assert mixer(backend="reference").kernel_backend(**facts) == "reference"
