"""Routing and experts against the equations, token by token; balancing, capacity, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from llmtrain.channels.mlp import SwiGLU
from llmtrain.channels.moe import MoE
from llmtrain.channels.moe_dense import MoEDense
from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise

D, HIDDEN, B, T = 12, 20, 2, 9
CTX = SequenceContext.dense(B, T)


def build(dtype=torch.float64, seed=0, **knobs):
    knobs = {"n_experts": 8, "top_k": 2, "hidden": HIDDEN, "init_std": 0.5, **knobs}
    channel = MoE(D, layer_idx=0, n_layers=2, **knobs)
    initialise(channel, seed)
    return channel.to(dtype)


def random_input(seed=0, rows=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, T, D, generator=generator, dtype=torch.float64).to(dtype)


def swiglu(x_D, gate_up_FD, down_DF):
    gate_F, up_F = (gate_up_FD @ x_D).chunk(2)
    return down_DF @ (gate_F / (1 + torch.exp(-gate_F)) * up_F)


# The equations, token by token.


def chosen_by_hand(channel, logits_E):
    """(experts, weights) of one token, from the definitions in channels/router.py."""
    router, bias_E = channel.router, channel.router.expert_bias
    softmax_E = torch.exp(logits_E) / torch.exp(logits_E).sum()
    scores_E = 1 / (1 + torch.exp(-logits_E)) if router.score == "sigmoid" else softmax_E
    choice = logits_E if router.score == "softmax_after" else scores_E
    choice = choice.tolist() if bias_E is None else (choice + bias_E).tolist()
    size = len(choice) // router.n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.n_groups)]
    groups.sort(key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:2]))
    allowed = [e for group in groups[: router.top_groups] for e in group]
    experts = sorted(allowed, key=lambda e: -choice[e])[: router.top_k]
    weights = scores_E[experts]
    if router.renormalise:
        weights = weights / weights.sum()
    return experts, router.scaling_factor * weights


ROUTINGS = {
    "softmax_before": {},
    "softmax_before, not renormalised": {"renormalise": False},
    "softmax_after": {"score": "softmax_after", "top_k": 3},
    "sigmoid": {"score": "sigmoid", "scaling_factor": 2.5},
    "sigmoid, not renormalised": {"score": "sigmoid", "renormalise": False},
    "bias": {"score": "sigmoid", "bias_update_speed": 0.0},
    "bias on softmax": {"bias_update_speed": 0.0},
    "groups": {"n_groups": 4, "top_groups": 2, "top_k": 3},
    "groups of one": {"n_groups": 8, "top_groups": 3},
    "deepseek": {
        "score": "sigmoid",
        "bias_update_speed": 0.0,
        "n_groups": 4,
        "top_groups": 2,
        "n_shared": 2,
        "scaling_factor": 2.5,
    },
    "one": {"top_k": 1, "renormalise": False},
    "all": {"top_k": 8},
    "shared gate": {"n_shared": 1, "shared_hidden": 7, "shared_gate": True},
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equations_token_by_token(routing):
    channel, x_BTD = build(**ROUTINGS[routing]), random_input()
    bias_E = channel.router.expert_bias
    if bias_E is not None:
        bias_E.copy_(torch.linspace(-0.4, 0.4, 8))
    y_BTD, _ = channel(x_BTD, CTX)
    for b in range(B):
        for t in range(T):
            x_D = x_BTD[b, t]
            experts, weights = chosen_by_hand(channel, channel.router.weight @ x_D)
            expected_D = sum(
                w * swiglu(x_D, channel.gate_up[e], channel.down[e])
                for e, w in zip(experts, weights, strict=True)
            )
            if channel.shared is not None:
                shared_D = swiglu(x_D, channel.shared.gate_up.weight, channel.shared.down.weight)
                if channel.shared_gate is not None:
                    shared_D = shared_D * (channel.shared_gate.weight[0] @ x_D).sigmoid()
                expected_D = expected_D + shared_D
            torch.testing.assert_close(y_BTD[b, t], expected_D, atol=1e-12, rtol=1e-10)


def test_dense_mixture_token_by_token():
    channel = MoEDense(D, layer_idx=0, n_layers=2, n_experts=3, hidden=HIDDEN, init_std=0.5)
    initialise(channel, 0)
    channel, x_BTD = channel.double(), random_input()
    y_BTD, aux = channel(x_BTD, CTX)
    entropies = []
    for b in range(B):
        for t in range(T):
            x_D = x_BTD[b, t]
            p_E = (channel.router.weight @ x_D).softmax(dim=0)
            expected_D = sum(
                p_E[e] * swiglu(x_D, channel.gate_up[e], channel.down[e]) for e in range(3)
            )
            torch.testing.assert_close(y_BTD[b, t], expected_D, atol=1e-12, rtol=1e-10)
            entropies.append(-(p_E * p_E.log()).sum() / math.log(3))
    torch.testing.assert_close(aux["metric/router_entropy"], torch.stack(entropies).mean())


def test_moe_of_all_experts_is_the_dense_mixture():
    dense = MoEDense(D, layer_idx=0, n_layers=2, n_experts=4, hidden=HIDDEN, init_std=0.5)
    initialise(dense, 0)
    sparse = build(n_experts=4, top_k=4, score="softmax_after")
    sparse.load_state_dict(dense.state_dict())
    x_BTD = random_input()
    torch.testing.assert_close(sparse(x_BTD, CTX)[0], dense.double()(x_BTD, CTX)[0])


def test_one_expert_is_a_plain_layer_with_its_gradients():
    """Bit for bit: its weight is one, and sorting changes nothing."""
    one = build(torch.float32, n_experts=1, top_k=1, renormalise=False)
    plain = SwiGLU(D, layer_idx=0, n_layers=2, hidden=HIDDEN)
    plain.load_state_dict({"gate_up.weight": one.gate_up[0], "down.weight": one.down[0]})
    results = []
    for channel, weights in ((one, (one.gate_up, one.down)), (plain, plain.parameters())):
        x_BTD = random_input(dtype=torch.float32).requires_grad_()
        y_BTD = channel(x_BTD, CTX)[0]
        gradients = torch.autograd.grad(y_BTD.square().sum(), [x_BTD, *weights])
        results.append([y_BTD, *gradients])
    for mine, expected in zip(*results, strict=True):
        assert mine.reshape(expected.shape).equal(expected)


# Losses.


def test_sequence_balance_loss_is_deepseeks():
    """Eq. 17 to 20 for each row, alpha 0.3."""
    channel = build(score="sigmoid", balance_loss=0.3, balance="sequence", top_k=3)
    x_BTD = random_input()
    _, aux = channel(x_BTD, CTX)
    losses = []
    for b in range(B):
        s_TE = (x_BTD[b] @ channel.router.weight.T).sigmoid()
        chosen = [sorted(range(8), key=lambda e: -s_TE[t, e].item())[:3] for t in range(T)]
        f_E = torch.tensor([sum(e in c for c in chosen) for e in range(8)]) * 8 / (3 * T)
        p_E = (s_TE / s_TE.sum(dim=1, keepdim=True)).mean(dim=0)
        losses.append(0.3 * (f_E * p_E).sum())
    torch.testing.assert_close(aux["loss/balance"], torch.stack(losses).mean())


def test_equal_shares_cost_one():
    channel = build(balance_loss=1.0, n_experts=4, top_k=4)
    channel.router.weight.data.zero_()
    _, aux = channel(random_input(), CTX)
    torch.testing.assert_close(aux["loss/balance"], torch.ones((), dtype=torch.float64))


def test_z_loss():
    channel, x_BTD = build(z_loss=0.25), random_input()
    _, aux = channel(x_BTD, CTX)
    logits = (x_BTD @ channel.router.weight.T).flatten(0, 1)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist())
    assert aux["loss/router_z"].item() == pytest.approx(0.25 * expected / len(logits))


def test_what_is_logged():
    channel = build(capacity_factor=0.5)
    _, aux = channel(random_input(), CTX)
    loads = aux["sum/load"]
    assert loads.sum() == B * T * 2
    capacity = math.ceil(0.5 * B * T * 2 / 8)
    assert aux["sum/dropped"] == (loads - capacity).clamp(min=0).sum() > 0
    sums = {"load": torch.tensor([6.0, 2.0, 0, 0, 0, 0, 0, 0]), "dropped": torch.tensor(3.0)}
    metrics = channel.after_step(sums)
    assert metrics["metric/max_load"].item() == 6.0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(8)
    assert metrics["metric/load_entropy"].item() == pytest.approx(entropy)
    assert metrics["metric/dropped"].item() == 3.0
    assert "metric/dropped" not in build().after_step({"load": sums["load"]})


# The bias.


def test_bias_moves_against_the_load_and_not_the_weights():
    channel = build(bias_update_speed=0.125)
    sums = {"load": torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5], dtype=torch.float64)}
    channel.after_step(sums)
    assert channel.router.expert_bias.tolist() == [-0.125, 0.125, 0, 0, 0, 0, 0, 0]
    x_ND = random_input().flatten(0, 1)
    before = build().router(x_ND)
    channel.router.expert_bias.fill_(0.3)  # the same for all: nothing changes
    after = channel.router(x_ND)
    assert before.weights_NA.equal(after.weights_NA)
    channel.router.expert_bias[3] = 100.0
    moved = channel.router(x_ND)
    assert (moved.experts_NA[:, 0] == 3).all()
    others = moved.probs_NE.gather(1, moved.experts_NA)
    torch.testing.assert_close(moved.weights_NA, others / others.sum(dim=1, keepdim=True))
    assert not channel.router.expert_bias.requires_grad
    assert "router.expert_bias" in channel.state_dict()


def test_bias_evens_out_a_skewed_router():
    channel, shares = build(score="sigmoid", bias_update_speed=0.02), []
    with torch.no_grad():
        channel.router.weight[0] += 1.0
    for step in range(150):
        x_BTD = random_input(seed=step, rows=8) + 1.0
        _, aux = channel(x_BTD, SequenceContext.dense(8, T))
        shares.append(channel.after_step({"load": aux["sum/load"]})["metric/max_load"].item())
    assert shares[0] > 3.0
    assert sum(shares[-20:]) / 20 < 1.8


def test_a_bias_of_speed_zero_stays():
    channel = build(bias_update_speed=0.0)
    channel.router.expert_bias.fill_(0.5)
    channel.after_step({"load": torch.arange(8.0)})
    assert channel.router.expert_bias.eq(0.5).all()


# Randomness and capacity: training only.


def test_noise_is_in_training_only_and_moves_choices():
    channel, x_BTD = build(noise=2.0), random_input()
    quiet = build()
    assert not channel.eval()(x_BTD, CTX)[0].equal(channel.train()(x_BTD, CTX)[0])
    assert channel.eval()(x_BTD, CTX)[0].equal(quiet(x_BTD, CTX)[0])
    torch.manual_seed(0)
    first = channel.train().router(x_BTD.flatten(0, 1))
    second = channel.router(x_BTD.flatten(0, 1))
    assert (first.experts_NA != second.experts_NA).any()
    assert first.logits_NE.equal(second.logits_NE)
    draws = torch.stack([channel.router(x_BTD.flatten(0, 1)).probs_NE.log() for _ in range(400)])
    apart = draws[..., 0] - draws[..., 1]  # the difference of two draws
    assert apart.std(dim=0).mean().item() == pytest.approx(2.0 * math.sqrt(2), rel=0.05)


def test_recomputation_repeats_the_noise(build_model):
    """Activation checkpointing must choose the same experts again, or gradients are wrong."""
    small = ("model.d_model=16", "model.ffn_hidden=24", "model.n_layers=2", "channel.noise=1.0")
    tokens = torch.arange(24).view(2, 12)
    gradients = []
    for kind in ("none", "full"):
        model = build_model(*small, channel="moe")
        model.stack.activation_checkpointing = kind
        torch.manual_seed(3)
        model(tokens, SequenceContext.dense(2, 12)).hidden_BTD.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_plain_checkpointing_would_not_repeat_it():
    """That the test above can fail."""
    channel, x_BTD = build(noise=1.0), random_input().requires_grad_()
    torch.manual_seed(3)
    expected = torch.autograd.grad(channel(x_BTD, CTX)[0].sum(), x_BTD)[0]
    torch.manual_seed(3)
    how = {"use_reentrant": False, "preserve_rng_state": False}
    got = torch.autograd.grad(checkpoint(channel, x_BTD, CTX, **how)[0].sum(), x_BTD)[0]
    assert not got.allclose(expected)
    assert channel.stochastic
    assert not build().stochastic


def test_capacity_drops_the_latest():
    """An expert's pairs beyond capacity give nothing; the same channel in eval drops none."""
    channel, whole = build(capacity_factor=0.5), build()
    x_BTD = random_input()
    routing = channel.router(x_BTD.flatten(0, 1))
    taken, capacity = [0] * 8, math.ceil(0.5 * B * T * 2 / 8)
    expected_ND, dropped = torch.zeros(B * T, D, dtype=torch.float64), 0
    for n in range(B * T):
        for a, e in enumerate(routing.experts_NA[n].tolist()):
            taken[e] += 1
            if taken[e] > capacity:
                dropped += 1
                continue
            y_D = swiglu(x_BTD.flatten(0, 1)[n], channel.gate_up[e], channel.down[e])
            expected_ND[n] += routing.weights_NA[n, a] * y_D
    y_BTD, aux = channel(x_BTD, CTX)
    assert aux["sum/dropped"] == dropped > 0
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected_ND)
    assert channel.eval()(x_BTD, CTX)[0].equal(whole(x_BTD, CTX)[0])
    assert channel(x_BTD, CTX)[1]["sum/dropped"] == 0


def test_capacity_lets_no_token_change_an_earlier_one():
    channel, x_BTD = build(capacity_factor=0.5), random_input(rows=1)
    other_BTD = x_BTD.clone()
    other_BTD[:, 5] = -other_BTD[:, 5]
    ctx = SequenceContext.dense(1, T)
    torch.testing.assert_close(channel(x_BTD, ctx)[0][:, :5], channel(other_BTD, ctx)[0][:, :5])


def test_ample_capacity_changes_nothing():
    channel, whole, x_BTD = build(capacity_factor=8.0), build(), random_input()
    y_BTD, aux = channel(x_BTD, CTX)
    assert aux["sum/dropped"] == 0
    assert y_BTD.equal(whole(x_BTD, CTX)[0])


# Numbers.


def test_router_computes_in_float32():
    """In bfloat16 a logit of 30 would be rounded to an eighth."""
    channel = build(torch.float32)
    x_ND = random_input(dtype=torch.bfloat16).flatten(0, 1)
    logits_NE = channel.router(x_ND).logits_NE
    assert logits_NE.dtype == torch.float32
    exact = x_ND.double() @ channel.router.weight.double().T
    torch.testing.assert_close(logits_NE.double(), exact, atol=1e-5, rtol=1e-5)
    assert channel.router(x_ND).weights_NA.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax_before", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_extreme_logits_stay_finite(score, scale):
    channel = build(torch.float32, score=score)
    x_BTD = (scale * random_input(dtype=torch.float32)).bfloat16().requires_grad_()
    routing = channel.router(x_BTD.flatten(0, 1))
    assert routing.weights_NA.isfinite().all()
    gradient = torch.autograd.grad(routing.weights_NA.square().sum(), channel.router.weight)[0]
    assert gradient.isfinite().all()
    channel.router.weight.data.neg_()  # sigmoids that all underflow
    assert channel.router(-x_BTD.abs().flatten(0, 1)).weights_NA.isfinite().all()


def test_repeats_bit_for_bit():
    channel, x_BTD = build(torch.float32), random_input(dtype=torch.float32)
    results = []
    for _ in range(2):
        channel.zero_grad()
        y_BTD, _ = channel(x_BTD, CTX)
        y_BTD.square().sum().backward()
        results.append([y_BTD, *(p.grad for p in channel.parameters())])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_first_weights_are_those_of_linear_layers():
    channel = build(torch.float32, n_experts=32, init_std=0.5)
    assert channel.gate_up.std().item() == pytest.approx(0.5, rel=0.02)
    assert channel.down.std().item() == pytest.approx(0.5 / math.sqrt(2 * 2), rel=0.02)
    assert channel.router.weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_idle_parameters_are_those_without_gradient():
    channel = build(n_experts=6, top_k=2, n_shared=1)
    y_BTD, _ = channel(random_input()[:1, :1], SequenceContext.dense(1, 1))
    y_BTD.sum().backward()
    idle = sum(
        parameter[e].numel()
        for parameter in (channel.gate_up, channel.down)
        for e in range(6)
        if parameter.grad[e].eq(0).all()
    )
    assert channel.idle_parameters() == idle == 4 * 3 * D * HIDDEN


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_named_backends_agree(backend):
    channel, plain = (build(torch.float32, hidden=16, backend=b) for b in (backend, "auto"))
    x_BTD = random_input(dtype=torch.float32)
    torch.testing.assert_close(channel(x_BTD, CTX)[0], plain(x_BTD, CTX)[0])
    device = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert channel.kernel_backend(**device) == backend
    assert plain.kernel_backend(**device) == "loop"


def test_step_is_forward(build_model):
    model = build_model("model.d_model=16", "model.ffn_hidden=24", channel="moe").eval()
    tokens = torch.arange(14).view(2, 7)
    expected = model.logits(model(tokens, SequenceContext.dense(2, 7)).hidden_BTD)
    state = model.init_state(2, max_tokens=7)
    for t in range(7):
        logits_BO, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(logits_BO, expected[:, t])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"top_k": 9}, r"top_k: got top_k=9 of n_experts=8, expected 1 <= top_k <= n_experts; set"),
        ({"top_k": 0}, r"top_k: got top_k=0 of n_experts=8, expected 1 <="),
        ({"n_experts": 0}, r"top_k: got top_k=2 of n_experts=0"),
        ({"n_groups": 3}, r"n_groups: got n_groups=3 for n_experts=8, expected a divisor; set"),
        ({"n_groups": 0}, r"n_groups: got n_groups=0 for n_experts=8, expected a divisor"),
        ({"n_groups": 4, "top_groups": 5}, r"top_groups: got top_groups=5 of n_groups=4, expected"),
        ({"top_groups": 0}, r"top_groups: got top_groups=0 of n_groups=1, expected 1 <= top_g"),
        (
            {"n_groups": 4, "top_k": 3},
            r"top_groups: got top_groups=1 groups of 2 experts, which is 2, expected at least "
            r"top_k=3; raise channel.top_groups",
        ),
        ({"noise": -1.0}, r"noise: got -1.0, expected >= 0; set channel.noise"),
        ({"score": "relu"}, r"score: got 'relu', expected one of softmax_before, softmax_after, s"),
        (
            {"score": "softmax_after", "renormalise": False},
            r"renormalise: got false with score=softmax_after, whose weights always sum to one",
        ),
        ({"top_k": 1}, r"renormalise: got true with top_k=1, where every weight is one and the r"),
        ({"hidden": 0}, r"hidden: got 0, expected >= 1; set model.ffn_hidden"),
        ({"n_shared": -1}, r"n_shared: got -1, expected >= 0; set channel.n_shared"),
        ({"shared_gate": True}, r"n_shared: got 0 with shared_hidden=None and shared_gate=True, "),
        ({"shared_hidden": 4}, r"n_shared: got 0 with shared_hidden=4 and shared_gate=False, whi"),
        ({"n_shared": 1, "shared_hidden": 0}, r"shared_hidden: got 0, expected >= 1, or null for"),
        (
            {"balance_loss": -0.1},
            r"balance_loss: got -0.1, expected >= 0; set channel.balance_loss",
        ),
        ({"z_loss": -0.1}, r"z_loss: got -0.1, expected >= 0; set channel.z_loss"),
        ({"bias_update_speed": -1.0}, r"bias_update_speed: got -1.0, expected >= 0; set channel."),
        ({"balance": "row"}, r"balance: got 'row', expected one of micro_batch, sequence; set cha"),
        (
            {"balance": "sequence", "balance_loss": 0.0},
            r"balance: got sequence with balance_loss=0, where it has no effect, expected micro_ba",
        ),
        ({"capacity_factor": 0.0}, r"capacity_factor: got 0.0, expected more than 0, or null to d"),
        (
            {"backend": "fast"},
            r"moe: got backend='fast', expected auto or one of grouped, loop, ma",
        ),
    ],
)
def test_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


def test_dense_mixture_errors():
    for knobs, message in (
        ({"n_experts": 0, "hidden": 4}, r"n_experts: got 0, expected >= 1; set channel.n_experts"),
        ({"n_experts": 2, "hidden": 0}, r"hidden: got 0, expected >= 1; set model.ffn_hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            MoEDense(D, layer_idx=0, n_layers=2, **knobs)


def test_swiglu_by_hand_is_torchs():
    """The helper of this file."""
    x_D, gate_up, down = torch.randn(D), torch.randn(2 * HIDDEN, D), torch.randn(D, HIDDEN)
    gate, up = (gate_up @ x_D).chunk(2)
    torch.testing.assert_close(swiglu(x_D, gate_up, down), down @ (F.silu(gate) * up))
