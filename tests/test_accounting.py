from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.accounting import (
    activation_bytes,
    active_parameters,
    flops_per_token,
    logits_bytes,
    memory_per_rank,
    mfu,
    parameters_by_part,
    peak_flops,
    state_bytes,
    train_flops_per_token,
)
from llmtrain.context import SequenceContext
from llmtrain.model.linear import Linear
from llmtrain.objectives.causal import Causal

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = (
    "model.d_model=64",
    "model.n_layers=3",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=160",
    "mixer.backend=reference",
)


RECURRENT = ("stack.sampling=fixed", "stack.repeats=5", "stack.backprop_repeats=null")


def test_published_size_of_llama3_8b(build_model):
    model = build_model(model="llama3_8b", vocab_size=128256, device="meta")
    counts = parameters_by_part(model)
    assert counts["total"] == 8_030_261_248
    assert counts["embedding"] == counts["head"] == 128256 * 4096
    assert counts["norm"] == 65 * 4096
    assert counts["channel"] == 32 * 3 * 4096 * 14336


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, ()),
        ({"position": "learned", "norm": "layernorm", "channel": "gelu"}, ()),
        ({"stack": "recurrent_depth"}, ("model.tie_embeddings=false", "mixer.qk_norm=true")),
        ({}, ("stack.norm_position=post",)),
        ({}, ("stack.norm_position=sandwich",)),
        ({}, ("stack.shared=a",)),
        (
            {"stack": "shared_attention", "mixers": {"b": "mha"}, "channel": "none"},
            ("stack.pattern=aba",),
        ),
    ],
)
def test_parts_add_to_all_parameters(build_model, options, changes):
    model = build_model(*SMALL, *changes, **options)
    counts = parameters_by_part(model)
    total = counts.pop("total")
    assert total == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert (counts["head"] > 0) == (not model.embedding.tied)
    assert (counts["position"] > 0) == (options.get("position") == "learned")
    mixers = {id(p): p for b in model.stack.blocks for p in b.mixer.parameters()}
    assert counts["mixer"] == sum(p.numel() for p in mixers.values())
    assert (counts["stack"] > 0) == (options.get("stack") is not None)


def test_active_parameters_are_those_of_one_token(build_model):
    """Of the experts' matrices, those that one token has a gradient for; all of everything else."""
    experts = ("stack.channel_pattern=[a,b,b]", "channels.b.n_experts=6", "channels.b.n_shared=1")
    model = build_model(*SMALL, *experts, channels={"b": "moe"})
    model(
        torch.zeros(1, 1, dtype=torch.int64), SequenceContext.dense(1, 1)
    ).hidden_BTD.sum().backward()
    idle = sum(
        matrix.numel()
        for parameter in model.parameters()
        if parameter.ndim == 3
        for matrix in parameter.grad
        if matrix.eq(0).all()
    )
    total = sum(p.numel() for p in model.parameters())
    assert idle == 2 * 4 * 3 * 64 * 160
    assert active_parameters(model) == total - idle
    dense = build_model(*SMALL, channel="moe_dense")
    assert active_parameters(dense) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, ()),
        ({"channel": "relu2", "stack": "recurrent_depth"}, RECURRENT),
        ({"stack": "recurrent_depth"}, (*RECURRENT, "stack.backprop_repeats=2")),
        (
            {"stack": "shared_attention", "mixers": {"b": "mha"}},
            ("stack.pattern=aba", "mixers.b.backend=reference"),
        ),
        ({}, ("mixer.window=8",)),
        ({"channel": "moe"}, ("channel.n_shared=1", "channel.shared_gate=true")),
        ({"channel": "moe_dense"}, ()),
    ],
)
def test_flops_against_the_counter(build_model, options, changes):
    """The reference attention multiplies visible pairs only, as the formula counts them."""
    model = build_model(*SMALL, *changes, dtype=torch.float32, **options)
    batch = torch.zeros(2, 40, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        out = Causal()(model, batch, batch, torch.ones(2, 40), SequenceContext.dense(2, 40))
    expected = 80 * flops_per_token(model, 40)
    assert forward.get_total_flops() == pytest.approx(expected, rel=1e-12)

    with FlopCounterMode(display=False) as backward:
        out.loss_sum.backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(80 * train_flops_per_token(model, 40), rel=1e-12)


def test_state_bytes_against_a_state(build_model):
    model = build_model(
        *SMALL,
        "stack.pattern=aba",
        "mixers.b.window=8",
        mixers={"b": "sliding_window"},
        dtype=torch.bfloat16,
    )
    state = model.init_state(batch=1, max_tokens=20)
    held = sum(x.numel() * x.itemsize for layer in state.layers for x in layer.values())
    assert state_bytes(model, 20, torch.bfloat16) == held


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peak_of_devices(name, expected):
    assert peak_flops(name) == expected


def test_mfu():
    assert mfu(1e6, 4.945e8, "NVIDIA H200") == pytest.approx(0.5)
    assert mfu(8e6, 4.945e8, "NVIDIA H200", devices=8) == pytest.approx(0.5)
    assert mfu(1e6, 5e8, "cpu") is None


def estimate(model, **changes):
    settings = {"stage": 0, "world_size": 1, "micro_batch": 2, "seq_len": 64, **changes}
    return memory_per_rank(model, **settings)


def test_model_states_by_stage(build_model):
    """Bytes per parameter of the rank: weights, master copy, gradients, Adam's two moments."""
    model = build_model(*SMALL, device="meta", dtype=torch.float32)
    n = parameters_by_part(model)["total"]
    whole, eighth = 4 * n, 4 * -(-n // 8)
    table = {
        (0, 1): (whole, 0, whole, 2 * whole, 0),
        (0, 8): (whole, 0, whole, 2 * whole, 0),
        (1, 1): (whole, 0, whole, 2 * whole, 0),
        (1, 8): (whole, 0, whole, 2 * eighth, eighth),
        (2, 1): (whole, 0, whole, 2 * whole, 0),
        (2, 8): (whole, 0, eighth, 2 * eighth, eighth),
        (3, 8): (eighth + 4000, eighth, eighth, 2 * eighth, eighth),
    }
    for (stage, world), expected in table.items():
        got = estimate(model, stage=stage, world_size=world, live_parameters=1000)
        assert (got.parameters, got.master, got.gradients, got.optimizer, got.step) == expected


def test_total_is_the_fuller_of_backward_and_step(build_model):
    model = build_model(*SMALL, device="meta", dtype=torch.float32)
    small, large = (estimate(model, stage=1, world_size=2, seq_len=n) for n in (1, 4096))
    for got, temporary in ((small, small.step), (large, large.activations + large.logits)):
        lasting = got.parameters + got.master + got.gradients + got.optimizer + got.buffers
        assert got.total == lasting + temporary
    two = estimate(model, world_size=2)
    assert estimate(model, world_size=2, bucket_elements=1000).buffers == 4000
    assert estimate(model, world_size=2, bucket_elements=1000).total == two.total + 4000
    count = sum(p.numel() for p in model.parameters())
    assert estimate(model, world_size=2, bucket_elements=10**12).buffers == 4 * count
    assert estimate(model, bucket_elements=1000) == estimate(model)


def held_bytes(model, stack, rows, tokens):
    """Bytes of all that autograd keeps of one forward pass, parameters left out. stack: the
    model's, or the same compiled."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor lives, so the address does
        return tensor

    ctx = SequenceContext.dense(rows, tokens)
    ctx = replace(ctx, rotary=model.position.rotary(ctx))
    width = model.embedding.weight.shape[1]
    x_BTD = torch.randn(rows, tokens, width, dtype=model.compute_dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack(x_BTD, ctx)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, (size, _) in kept.items() if pointer not in weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel": "gelu"},
        {"channel": "relu2", "norm": "layernorm"},
        {"channel": "moe"},
        {"channel": "moe_dense"},
    ],
)
def test_activations_of_channels_against_what_autograd_keeps(build_model, options):
    model = build_model(*SMALL, "mixer.backend=sdpa", dtype=torch.bfloat16, **options)
    held = held_bytes(model, model.stack, rows=4, tokens=256)
    assert 0.6 < activation_bytes(model, 4 * 256, "none") / held < 1.4


# torch's attention keeps all scores on a CPU when values are not as wide as keys
EQUAL_WIDTHS = {"mla": ("mixer.v_head_dim=48",)}


@pytest.mark.parametrize("mixer", sorted(path.stem for path in CONFIGS.glob("mixer/*.yaml")))
def test_activations_of_mixers_against_what_autograd_keeps(build_model, mixer):
    """Between 0.8 and 1.4 of it: eager, and with torch.compile's choice of what to keep, for which
    no code has to be made. norm=layernorm: torch's RMSNorm keeps float32 copies on a CPU alone."""
    sizes = ("model.d_model=128", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=4")
    model = build_model(
        *sizes,
        *EQUAL_WIDTHS.get(mixer, ()),
        mixer=mixer,
        channel="none",
        norm="layernorm",
        dtype=torch.bfloat16,
    )
    held = held_bytes(model, model.stack, rows=2, tokens=512)
    assert 0.8 < activation_bytes(model, 2 * 512, "none") / held < 1.4
    torch._dynamo.reset()
    compiled = torch.compile(model.stack, backend="aot_eager_decomp_partition", fullgraph=True)
    held = held_bytes(model, compiled, rows=2, tokens=512)
    assert 0.8 < activation_bytes(model, 2 * 512, "none", compiled=True) / held < 1.4


def copied(model):
    """Bytes of the blocks' weights in bf16, which the trainer holds throughout."""
    return 2 * sum(m.weight.numel() for m in model.stack.modules() if isinstance(m, Linear))


def test_recurrent_mixers_need_more_than_attention(build_model):
    """What a chunked recurrence keeps counts in the estimate of a rank, less of it compiled, and
    with recomputation for one block at a time."""
    sizes = (*SMALL[:-1], "mixer.head_dim=32", "mixer.d_state=32")
    model = build_model(*sizes, mixer="mamba2", device="meta", dtype=torch.bfloat16)
    eager, compiled = (estimate(model, compiled=c).activations for c in (False, True))
    mixer = model.stack.blocks[0].mixer
    beside = [mixer.kept_bytes(torch.bfloat16, compiled=c) for c in (False, True)]
    assert eager - compiled == 3 * 128 * (beside[0] - beside[1]) > 0
    full = estimate(model, activation_checkpointing="full").activations
    assert full == (eager - copied(model)) // 3 + copied(model) + 3 * 128 * 64 * 2


def test_recomputation_keeps_the_inputs_of_blocks(build_model):
    model = build_model(*SMALL, device="meta", dtype=torch.bfloat16)
    none, full = (activation_bytes(model, 1024, mode) for mode in ("none", "full"))
    assert full == (none - copied(model)) // 3 + copied(model) + 3 * 1024 * 64 * 2


def test_logits(build_model):
    model = build_model(*SMALL, device="meta", dtype=torch.bfloat16)
    assert model.padded_vocab_size == 64
    assert logits_bytes(model, 1000, compiled=True, chunk_tokens=None) == 1000 * 64 * 4
    assert logits_bytes(model, 1000, compiled=False, chunk_tokens=None) == 1000 * 64 * 16
    assert logits_bytes(model, 1000, compiled=False, chunk_tokens=100) == 100 * 64 * 16
    assert logits_bytes(model, 1000, compiled=True, chunk_tokens=5000) == 1000 * 64 * 4


def test_unknown_stage(build_model):
    with pytest.raises(ValueError, match=r"memory: got ZeRO stage 4, expected 0, 1, 2 or 3; set"):
        estimate(build_model(*SMALL, device="meta"), stage=4)
