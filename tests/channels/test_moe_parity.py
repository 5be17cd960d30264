"""The mixture of experts against transformers' own modules: values and gradients."""

import pytest
import torch

from llmtrain.channels.moe import MoE
from llmtrain.context import SequenceContext
from llmtrain.model.init import initialise

D, HIDDEN, B, T = 12, 20, 2, 9
CTX = SequenceContext.dense(B, T)
FLOAT32_INSIDE = {"atol": 5e-6, "rtol": 1e-5}  # transformers' routers round to float32


def build(**knobs):
    knobs = {"n_experts": 8, "top_k": 2, "hidden": HIDDEN, "init_std": 0.5, **knobs}
    channel = MoE(D, layer_idx=0, n_layers=2, **knobs)
    initialise(channel, 0)
    return channel.double()


def random_input():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def randomise(module, seed=5):
    """transformers leaves parameters empty or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return module


def compare(ours, theirs, weights, x_BTD):
    """weights: their parameter -> ours of the same gradient, as a function of the channel."""
    x1, x2 = (x_BTD.clone().requires_grad_() for _ in range(2))
    y1, y2 = ours(x1, CTX)[0], theirs(x2)
    y2 = y2[0] if isinstance(y2, tuple) else y2
    torch.testing.assert_close(y1, y2, **FLOAT32_INSIDE)
    upstream = torch.randn(y1.shape, generator=torch.Generator().manual_seed(3)).double()
    (y1 * upstream).sum().backward()
    (y2 * upstream).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, **FLOAT32_INSIDE)
    theirs_by_name = dict(theirs.named_parameters())
    assert set(weights) == set(theirs_by_name)
    for name, ours_of in weights.items():
        gradient = ours_of(lambda parameter: parameter.grad)
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(gradient, theirs_by_name[name].grad, **FLOAT32_INSIDE)


def with_weights(channel, theirs, weights):
    """Copy theirs into ours."""
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, ours_of in weights.items():
            ours_of(lambda parameter: parameter).copy_(named[name])
        if channel.router.expert_bias is not None:
            channel.router.expert_bias.copy_(theirs.gate.e_score_correction_bias)
    return channel


def routed(channel, router="gate"):
    return {
        f"{router}.weight": lambda of: of(channel.router.weight),
        "experts.gate_up_proj": lambda of: of(channel.gate_up),
        "experts.down_proj": lambda of: of(channel.down),
    }


def shared(channel, name):
    return {
        f"{name}.gate_proj.weight": lambda of: of(channel.shared.gate_up.weight).chunk(2)[0],
        f"{name}.up_proj.weight": lambda of: of(channel.shared.gate_up.weight).chunk(2)[1],
        f"{name}.down_proj.weight": lambda of: of(channel.shared.down.weight),
    }


def test_mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=D, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2
        )
    )
    theirs = randomise(theirs.double())
    for score in ("softmax_before", "softmax_after"):
        theirs.zero_grad()
        channel = build(score=score)
        weights = routed(channel)
        compare(with_weights(channel, theirs, weights), theirs, weights, random_input())


def test_deepseek_v3():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Config,
        DeepseekV3MoE,
    )

    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D,
            moe_intermediate_size=HIDDEN,
            n_routed_experts=16,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    theirs = randomise(theirs.double())
    channel = build(
        n_experts=16,
        top_k=3,
        score="sigmoid",
        scaling_factor=2.5,
        n_groups=4,
        top_groups=2,
        n_shared=2,
        bias_update_speed=0.001,
    )
    weights = routed(channel) | shared(channel, "shared_experts")
    with_weights(channel, theirs, weights)
    assert channel.router.expert_bias.abs().min() > 0
    compare(channel, theirs, weights, random_input())


def test_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextConfig,
        Qwen3NextSparseMoeBlock,
    )

    theirs = Qwen3NextSparseMoeBlock(
        Qwen3NextConfig(
            hidden_size=D,
            moe_intermediate_size=HIDDEN,
            shared_expert_intermediate_size=28,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        )
    )
    theirs = randomise(theirs.double())
    channel = build(top_k=3, n_shared=1, shared_hidden=28, shared_gate=True)
    weights = routed(channel) | shared(channel, "shared_expert")
    weights["shared_expert_gate.weight"] = lambda of: of(channel.shared_gate.weight)
    compare(with_weights(channel, theirs, weights), theirs, weights, random_input())


def test_jamba():
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaSparseMoeBlock

    theirs = JambaSparseMoeBlock(
        JambaConfig(hidden_size=D, intermediate_size=HIDDEN, num_experts=8, num_experts_per_tok=2)
    )
    theirs = randomise(theirs.double())
    channel = build(renormalise=False)
    weights = routed(channel, "router")
    compare(with_weights(channel, theirs, weights), theirs, weights, random_input())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_switchs(top_k):
    """transformers counts every choice as a token of its own, so that its loss is top_k times."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    channel = build(top_k=top_k, renormalise=False, balance_loss=0.01)
    x_BTD = random_input()
    _, aux = channel(x_BTD, CTX)
    logits_NE = (x_BTD @ channel.router.weight.T).flatten(0, 1)
    theirs = load_balancing_loss_func((logits_NE,), 8, top_k)
    torch.testing.assert_close(aux["loss/balance"], 0.01 * theirs.double() / top_k)
    ours, expected = (
        torch.autograd.grad(loss, channel.router.weight)[0]
        for loss in (aux["loss/balance"], 0.01 * theirs / top_k)
    )
    torch.testing.assert_close(ours, expected.double(), atol=1e-8, rtol=1e-5)
