"""Recurrent depth: the loop against the equations written out, training's draws, and early exit."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.generate import generate
from llmtrain.model.init import initialise
from llmtrain.model.latent import position_keys, truncated_normal
from llmtrain.model.norm import RMSNorm
from llmtrain.model.recurrent_depth import RecurrentDepth, draw_repeats, mean_kept
from llmtrain.model.stack import Stack

DENSE = SequenceContext.dense(2, 6)
LOOP = {"injection": "none", "latent": "prelude", "backprop_repeats": None, "core_norm": False}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-11)


@pytest.fixture
def make_stack(make_blocks):
    def make(n=4, *, activation_l1=None, norm_position="sandwich", **knobs):
        blocks = make_blocks(n, norm_position=norm_position, activation_l1=activation_l1)
        norm = partial(RMSNorm, 16)
        stack = RecurrentDepth(blocks, d_model=16, norm=norm, **{"init_std": 0.2, **knobs}).double()
        initialise(stack, 0)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in stack.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 2.0)
        return stack

    return make


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)


def written_out(stack, x, repeats, latent):
    """The equations of the module's docstring, one after another."""
    prelude, *core, coda = stack.blocks
    embedded = prelude(x, DENSE)[0]
    if not prelude.normalises_output:
        embedded = stack.injected_norm(embedded)
    for _ in range(repeats):
        latent = torch.cat([latent, embedded], -1) @ stack.adapter.weight.T
        for block in core:
            latent = block(latent, DENSE)[0]
    return stack.norm(coda(stack.norm(latent), DENSE)[0])


@pytest.mark.parametrize("norm_position", ["sandwich", "pre", "peri"])
def test_equations(make_stack, x, norm_position):
    stack = make_stack(repeats=3, norm_position=norm_position)
    noise = truncated_normal(position_keys(DENSE.positions_BT), 16, dtype=torch.float64)
    close(stack(x, DENSE)[0], written_out(stack, x, 3, 0.4**0.5 * noise))
    stack.set_depth(repeats=5)
    close(stack(x, DENSE)[0], written_out(stack, x, 5, 0.4**0.5 * noise))
    assert len(stack.applications) == 1 + 5 * 2 + 1


def test_loop_of_a_universal_transformer_is_the_written_out_stack(make_stack, x):
    stack = make_stack(repeats=3, prelude=1, coda=0, **LOOP)
    a, *core = stack.blocks
    assert torch.equal(stack(x, DENSE)[0], Stack([a, *core * 3])(x, DENSE)[0])
    assert stack.adapter is stack.norm is None


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_gradients_flow_through_the_last_iterations_only(make_stack, x, repeats):
    """As those of the equations whose latent is cut off before them."""
    stack = make_stack(repeats=repeats, backprop_repeats=2, latent="zeros")
    stack(x, DENSE)[0].square().sum().backward()
    got = [parameter.grad.clone() for parameter in stack.parameters()]
    stack.zero_grad()
    kept, latent = min(repeats, 2), torch.zeros_like(x)
    with torch.no_grad():
        prelude, *core, _ = stack.blocks
        embedded = prelude(x, DENSE)[0]
        for _ in range(repeats - kept):
            latent = stack.adapter(torch.cat([latent, embedded], -1))
            for block in core:
                latent = block(latent, DENSE)[0]
    written_out(stack, x, kept, latent).square().sum().backward()
    for gradient, parameter in zip(got, stack.parameters(), strict=True):
        close(gradient, parameter.grad)
        assert parameter.grad.abs().max() > 0


def test_recomputation_changes_no_gradient(make_stack, x):
    stack = make_stack(repeats=4, backprop_repeats=2)
    gradients = []
    for mode in ("none", "full"):
        stack.activation_checkpointing = mode
        stack.zero_grad()
        stack(x, DENSE)[0].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in stack.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_losses_of_iterations_without_gradient_do_not_count(make_stack, x):
    stack = make_stack(repeats=4, backprop_repeats=1, activation_l1=0.5)
    trained = stack(x, DENSE)[2]
    with torch.no_grad():
        evaluated = stack(x, DENSE)[2]
    assert trained["loss/activation_l1"] < 0.7 * evaluated["loss/activation_l1"]
    assert sorted(trained)[1:] == [f"metric/l{i:02d}/sparsity" for i in range(4)]
    for key in sorted(trained)[1:]:
        close(trained[key], evaluated[key])


def test_drawn_numbers(make_stack):
    stack = make_stack(repeats=8)

    def drawn(seed=0, step=3, first_row=4):
        return stack.drawn(DENSE, seed=seed, step=step, first_row=first_row)

    one, again, later_rows = drawn(), drawn(), drawn(first_row=5)
    assert one.repeats == again.repeats == later_rows.repeats
    assert torch.equal(one.noise_seeds_B, again.noise_seeds_B)
    assert torch.equal(one.noise_seeds_B[1:], later_rows.noise_seeds_B[:-1])
    assert len(set(one.noise_seeds_B.tolist())) == len(one.noise_seeds_B) > 1
    assert not set(drawn(step=4).noise_seeds_B.tolist()) & set(one.noise_seeds_B.tolist())
    assert len({drawn(step=step).repeats for step in range(20)}) > 5
    assert len({drawn(seed=seed).repeats for seed in range(20)}) > 5
    fixed = make_stack(repeats=8, sampling="fixed", latent="zeros")
    assert fixed.drawn(DENSE, seed=0, step=0, first_row=0) is DENSE
    assert Stack([stack.blocks[0]]).drawn(DENSE, seed=0, step=0, first_row=0) is DENSE


def test_a_drawn_context_rules(make_stack, x):
    stack = make_stack(repeats=3)
    ctx = replace(DENSE, repeats=5)
    stack_of_5 = make_stack(repeats=5)
    assert torch.equal(stack(x, ctx)[0], stack_of_5(x, DENSE)[0])
    one, two = (
        stack(x, replace(DENSE, noise_seeds_B=torch.tensor([seed] * len(x))))[0].detach()
        for seed in (1, 2)
    )
    assert not torch.allclose(one, two, rtol=1e-3)
    assert not torch.allclose(one, stack(x, DENSE)[0], rtol=1e-3)


def test_distribution_of_repeats():
    """Mean and variance of the lognormal Poisson, plus one (the law of total variance)."""
    mean, count = 8, 20_000
    numbers = torch.tensor([draw_repeats(seed, mean) for seed in range(count)]).double()
    variance = mean + mean**2 * (torch.tensor(0.25).exp().item() - 1)
    assert numbers.min() >= 1
    assert numbers.mean().item() == pytest.approx(mean + 1, abs=4 * (variance / count) ** 0.5)
    assert numbers.var().item() == pytest.approx(variance, rel=0.1)
    for limit in (1, 3, 8):
        expected = numbers.clamp(max=limit).mean().item()
        assert mean_kept(mean, limit) == pytest.approx(expected, abs=4 * limit / count**0.5)
    assert mean_kept(mean, None) == mean + 1
    assert mean_kept(mean, 1000) == pytest.approx(mean + 1)


def test_flops(make_stack):
    stack = make_stack(repeats=8, backprop_repeats=3, sampling="fixed")
    block, adapter = stack.blocks[0].flops_per_token(6), 2 * 2 * 16 * 16
    assert stack.flops_per_token(6) == 2 * block + 8 * (2 * block + adapter)
    core = 2 * block + adapter
    assert stack.train_flops_per_token(6) == 3 * 2 * block + core * (8 + 2 * 3)
    drawn = make_stack(repeats=8, backprop_repeats=None)
    assert drawn.train_flops_per_token(6) == pytest.approx(3 * (2 * block + 9 * core))
    assert len(stack.differentiated) == 2 + 3 * 3


# -- early exit ---------------------------------------------------------------------------------

SMALL = (
    "model.d_model=16",
    "model.n_layers=3",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.ffn_hidden=24",
    "model.init_std=0.3",
    "stack.latent=zeros",
    "stack.repeats=6",
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3]]


# mixer -> (its knobs, the entry of its cache that a test looks at)
CACHES = {
    "attention": ((), "k"),
    "sliding_window": (("mixer.window=3", "mixer.sinks=1"), "k"),
    "mla": ((), "latent"),
}


@pytest.fixture(params=CACHES)
def mixer(request):
    return request.param


@pytest.fixture
def exiting(build_model, mixer):
    return build_model(*SMALL, *CACHES[mixer][0], stack="recurrent_depth", mixer=mixer)


def changes(model, tokens):
    """What a row's first step moves in each iteration, relative to its latent: [repeats]."""
    ctx = SequenceContext.dense(1, 1)
    x = model.embedding(tokens)[:, None]
    ctx = ctx.with_rotary(model.position.rotary(ctx))
    stack = model.stack
    embedded, latent, moved = stack.blocks[0](x, ctx)[0], torch.zeros_like(x), []
    for _ in range(stack.repeats):
        before = latent
        latent = stack.blocks[1](stack.adapter(torch.cat([latent, embedded], -1)), ctx)[0]
        moved.append(((latent - before).norm() / latent.norm()).item())
    return moved


@torch.no_grad()
def test_a_threshold_below_every_change_changes_nothing(exiting):
    expected = generate(exiting, PROMPTS, max_new_tokens=8)
    exiting.stack.set_depth(exit_threshold=1e-12)
    assert generate(exiting, PROMPTS, max_new_tokens=8) == expected


@torch.no_grad()
def test_rows_exit_when_they_are_still_and_leave_their_last_entries(exiting, mixer):
    tokens = torch.tensor([3, 7, 11, 19])
    moved = [changes(exiting, tokens[i : i + 1]) for i in range(4)]
    threshold = sum(sorted(row[2] for row in moved)[1:3]) / 2  # some rows exit before others
    depths = [next((i + 1 for i, m in enumerate(row) if m < threshold), 6) for row in moved]
    assert len(set(depths)) > 1
    exiting.stack.set_depth(exit_threshold=threshold)
    _, state = exiting.step(tokens, exiting.init_state(4, 3))
    core = state.layers[1:7]
    for row, depth in enumerate(depths):
        for i in range(6):
            entry = CACHES[mixer][1]
            copied = torch.equal(core[i][entry][row, 0], core[max(i - 1, 0)][entry][row, 0])
            assert copied == (i >= depth or i == 0), (row, i)
            assert (core[i][entry][row, 1:] == 0).all()
            if "positions" in core[i]:
                assert core[i]["positions"][row].tolist() == [0, -1, -1]


@torch.no_grad()
def test_a_row_alone_exits_as_in_a_batch(exiting):
    exiting.stack.set_depth(exit_threshold=0.3)
    together = generate(exiting, PROMPTS, max_new_tokens=10)
    assert together == [generate(exiting, [prompt], max_new_tokens=10)[0] for prompt in PROMPTS]
    exiting.stack.set_depth()
    assert together != generate(exiting, PROMPTS, max_new_tokens=10)


@torch.no_grad()
def test_an_exit_after_the_first_iteration_is_depth_one_for_generated_tokens(exiting):
    """From an empty state, a threshold that all changes are below gives the model of one."""
    exiting.stack.set_depth(exit_threshold=1e9)
    state, tokens = exiting.init_state(1, 6), [3, 1, 4, 1, 5]
    got = []
    for token in tokens:
        logits, state = exiting.step(torch.tensor([token]), state)
        got.append(logits[0])
    for layer in state.layers[2:7]:  # the left out iterations hold what the first one computed
        assert all(torch.equal(layer[name], state.layers[1][name]) for name in layer)
    exiting.stack.set_depth(repeats=1)
    expected = exiting(torch.tensor([tokens]), SequenceContext.dense(1, 5)).hidden_BTD
    close(torch.stack(got), exiting.logits(expected)[0])


def test_exit_needs_a_cache_of_tokens(make_stack):
    with pytest.raises(ValueError, match=r"exit_threshold: the core's mixer Leaky keeps no cache"):
        make_stack().set_depth(exit_threshold=0.1)


@pytest.mark.parametrize("depth", [{"repeats": 0}, {"exit_threshold": 0.0}])
def test_depth_out_of_range(exiting, depth):
    name = next(iter(depth))
    with pytest.raises(ValueError, match=rf"{name}: got 0.*expected .*; set {name}="):
        exiting.stack.set_depth(**depth)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"prelude": -1},
            "got prelude=-1 and coda=1 of 4 layers, expected numbers >= 0 that leave",
        ),
        (
            {"prelude": 2, "coda": 2},
            "got prelude=2 and coda=2 of 4 layers, expected .* lower stack",
        ),
        ({"repeats": 0}, "repeats: got 0, expected at least 1; set stack.repeats"),
        ({"backprop_repeats": 0}, "backprop_repeats: got 0, expected at least 1, or null"),
        ({"latent_std": 0.0}, "latent_std: got 0.0, expected more than 0; set stack.latent_std"),
        (
            {"sampling": "x"},
            "sampling: got 'x', expected one of lognormal_poisson, fixed; set stac",
        ),
        ({"injection": "x"}, "injection: got 'x', expected one of concat, add, none; set stack"),
        ({"latent": "x"}, "latent: got 'x', expected one of normal, zeros, prelude; set stack"),
        ({"injection": "none"}, "injection: got none with latent=normal, so that the core never"),
        (
            {"injection": "none", "latent": "prelude"},
            "backprop_repeats: got 4 with injection=none, .*expected null; set stack.backprop",
        ),
    ],
)
def test_errors(make_stack, knobs, message):
    with pytest.raises(ValueError, match=message):
        make_stack(**knobs)
