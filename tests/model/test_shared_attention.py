"""Zamba's shared block: its equations, and transformers' hybrid layer."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import ZambaConfig, ZambaForCausalLM

from llmtrain.channels.mlp import SwiGLU
from llmtrain.channels.none import NoChannel
from llmtrain.context import SequenceContext
from llmtrain.mixers.attention import Attention
from llmtrain.model.init import initialise
from llmtrain.model.norm import RMSNorm
from llmtrain.model.shared_attention import SharedAttention, SharedBlock

D = 16
FACTS = {"layer_idx": 1, "n_layers": 4}


@pytest.fixture
def shared():
    mixer = Attention(D, n_heads=4, head_dim=8, d_input=2 * D, softmax_scale=0.5, **FACTS)
    channel = SwiGLU(D, hidden=24, init_std=0.3, **FACTS)
    return SharedBlock(mixer, channel, RMSNorm(2 * D), partial(RMSNorm, D))


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def test_equations(make_blocks, shared):
    a, b = make_blocks(2)
    stack = SharedAttention([shared, a, b, shared, a], d_model=D).double()
    randomise(stack)
    x, ctx = torch.randn(2, 6, D, dtype=torch.float64), SequenceContext.dense(2, 6)
    first, out = x, []
    for block, link in ((a, stack.links[0]), (b, None), (a, stack.links[1])):
        extra = 0
        if link is not None:
            u = torch.cat([x, first], -1)
            y = shared.mixer(shared.norm1(u), ctx)[0]
            extra = link(shared.channel(shared.norm2(y), ctx)[0])
        x = x + block.mixer(block.norm1(x + extra), ctx)[0]
        x = x + block.channel(block.norm2(x), ctx)[0]
        out.append(x)
    torch.testing.assert_close(stack(first, ctx)[0], x)
    links = 2 * 2 * D * D
    blocks = sum(block.flops_per_token(6) for block in (shared, a, b, shared, a))
    assert stack.flops_per_token(6) == blocks + links
    assert len(stack.applications) == 5


@pytest.mark.parametrize("channel", [True, False])
def test_step_equals_forward(make_blocks, shared, channel):
    if not channel:
        norms = RMSNorm(2 * D), partial(RMSNorm, D)
        shared = SharedBlock(shared.mixer, NoChannel(D, **FACTS), *norms)
    (a,) = make_blocks(1)
    stack = SharedAttention([a, shared, a, shared, a], d_model=D).double()
    initialise(stack, 0)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    whole, _, _ = stack(x, SequenceContext.dense(2, 7))
    state = stack.init_state(2, max_tokens=7, device="cpu", dtype=torch.float64)
    head, state, _ = stack(x[:, :3], SequenceContext.dense(2, 3), state)
    torch.testing.assert_close(head, whole[:, :3], atol=1e-13, rtol=1e-12)
    for t in range(3, 7):
        ctx = SequenceContext(positions_BT=torch.full((2, 1), t), max_seqlen=1)
        y, state = stack.step(x[:, t], ctx, state)
        torch.testing.assert_close(y, whole[:, t], atol=1e-13, rtol=1e-12)


ZAMBA = ZambaConfig(
    vocab_size=50,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
    mamba_d_state=5,
    attn_implementation="eager",
)
OURS = (
    "model.d_model=16",
    "model.n_layers=9",
    "model.n_heads=4",
    "model.head_dim=8",
    "model.ffn_hidden=24",
    "model.vocab_multiple=1",
    "mixer.n_heads=2",
    "mixer.d_state=5",
    "mixer.dt_limit=[0.0,.inf]",
    "mixers.b.softmax_scale=0.5",
    "stack.pattern=abaababaa",
    "stack.channel_pattern=abaababaa",
)


def zamba_mamba(theirs):
    """Weights of one of their Mamba layers by our names; in_proj's rows are x and gate in turn."""
    mamba = theirs.mamba
    return {
        "norm1.weight": theirs.input_layernorm.weight,
        "mixer.in_proj.weight": torch.cat([mamba.in_proj.weight[::2], mamba.in_proj.weight[1::2]]),
        "mixer.conv_weight": mamba.conv1d.weight.squeeze(1),
        "mixer.conv_bias": mamba.conv1d.bias,
        "mixer.x_proj": mamba.x_proj_weight,
        "mixer.dt_proj": mamba.dt_proj_weight,
        "mixer.dt_bias": mamba.dt_proj_bias.flatten(),
        "mixer.A_log": mamba.A_log.flatten(0, 1),
        "mixer.D": mamba.D.flatten(),
        "mixer.out_proj.weight": mamba.out_proj.weight,
    }


def zamba_shared(theirs):
    attention, mlp = theirs.self_attn, theirs.feed_forward
    return {
        "norm1.weight": theirs.input_layernorm.weight,
        "norm2.weight": theirs.pre_ff_layernorm.weight,
        "mixer.q_proj.weight": attention.q_proj.weight,
        "mixer.k_proj.weight": attention.k_proj.weight,
        "mixer.v_proj.weight": attention.v_proj.weight,
        "mixer.out_proj.weight": attention.o_proj.weight,
        "channel.gate_up.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        "channel.down.weight": mlp.down_proj.weight,
    }


def zamba_weights(theirs):
    """Weights of transformers' model by our names."""
    weights = {
        "embedding.weight": theirs.model.embed_tokens.weight,
        "norm.weight": theirs.model.final_layernorm.weight,
    }
    block = link = 0
    for layer in theirs.model.layers:
        if hasattr(layer, "shared_transf"):
            weights[f"stack.links.{link}.weight"] = layer.linear.weight
            if link == 0:  # the block stands in ours where it is applied first
                own = zamba_shared(layer.shared_transf)
                weights |= {f"stack.blocks.{block}.{name}": value for name, value in own.items()}
                block += 1
            link += 1
            layer = layer.mamba_decoder
        own = zamba_mamba(layer)
        weights |= {f"stack.blocks.{block}.{name}": value for name, value in own.items()}
        block += 1
    return weights


def test_logits_are_those_of_transformers_zamba(build_model):
    """And those of tokens one by one."""
    parts = {"mixers": {"b": "mha"}, "channels": {"b": "geglu"}, "position": "none"}
    ours = build_model(*OURS, stack="shared_attention", mixer="mamba", channel="none", **parts)
    theirs = ZambaForCausalLM(ZAMBA).double().eval()
    randomise(theirs)
    with torch.no_grad():
        for layer in theirs.model.layers:
            mamba = getattr(layer, "mamba_decoder", layer).mamba
            mamba.dt_proj_bias.sub_(2.0)  # small steps, as in a trained model
        ours.load_state_dict({n: w.clone() for n, w in zamba_weights(theirs).items()}, strict=True)
        for module in ours.modules():
            if isinstance(module, RMSNorm):
                module.eps = ZAMBA.rms_norm_eps
        tokens = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))
        expected = theirs(tokens, num_logits_to_keep=0, logits_to_keep=0).logits
        got = ours.logits(ours(tokens, SequenceContext.dense(2, 11)).hidden_BTD)
        # its norms, softmax and scan are float32
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
        state = ours.init_state(2, 11)
        for t in range(11):
            logits, state = ours.step(tokens[:, t], state)
            torch.testing.assert_close(logits, got[:, t], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layers", ["aas", "assa"])
def test_something_must_read_the_shared_block(make_blocks, shared, layers):
    (a,) = make_blocks(1)
    with pytest.raises(ValueError, match=r"shared block: got no layer of another letter right af"):
        SharedAttention([shared if letter == "s" else a for letter in layers], d_model=D)
    assert isinstance(SharedAttention([shared, a], d_model=D).links, nn.ModuleList)
