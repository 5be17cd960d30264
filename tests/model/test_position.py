"""Positions against transformers' and against what they are for."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GPTJConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmtrain.build import knobs, part
from llmtrain.context import Rotary, SequenceContext
from llmtrain.model import position
from llmtrain.model.init import initialise
from llmtrain.model.position import Learned, NoPosition, Rope, Sinusoidal, apply_rotary

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = {"none": NoPosition, "sinusoidal": Sinusoidal, "learned": Learned, "rope": Rope}
FACTS = {"max_seq_len": 64, "rotary_widths": (8,)}
B, T, H, K = 2, 20, 3, 8


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def dense(tokens=T, prefix_tokens=0):
    return SequenceContext.dense(B, tokens, prefix_tokens=prefix_tokens)


def packed(*starts):
    starts_BT = torch.zeros(len(starts), T, dtype=torch.bool)
    for row, indices in enumerate(starts):
        starts_BT[row, list(indices)] = True
    return SequenceContext.packed(starts_BT)


@pytest.mark.parametrize("name", CLASSES)
def test_yaml_keys_are_the_signature(name):
    config = OmegaConf.create({"model": OmegaConf.load(CONFIGS / "model" / "tiny.yaml")})
    config.position = OmegaConf.load(CONFIGS / "position" / f"{name}.yaml")
    node = OmegaConf.to_container(config, resolve=True)["position"]
    module = part(node, f"position={name}", 16, **FACTS)
    assert type(module) is CLASSES[name]
    assert module.rotary_kind is (name == "rope")
    parameters = inspect.signature(CLASSES[name]).parameters
    assert set(knobs(node)) == set(parameters) - {"d_model", *FACTS}


def test_all_options_are_tested():
    assert {path.stem for path in CONFIGS.glob("position/*.yaml")} == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_document_counts_from_its_start(cls):
    """Packed, each document gets what it would get alone; continued, what the whole row gets."""
    module = cls(16, **FACTS)
    initialise_if_needed(module)
    x_BTD = noise(B, T, 16)
    ctx = packed([0, 7], [0, 1])
    whole_BTD = module.add(x_BTD, ctx)
    assert whole_BTD.dtype == x_BTD.dtype
    alone_BTD = module.add(x_BTD[:, 7:], dense(T - 7))
    torch.testing.assert_close(whole_BTD[0, 7:], alone_BTD[0], rtol=0, atol=1e-12)
    row_BTD = module.add(x_BTD, dense())
    rest_BTD = module.add(x_BTD[:, 5:], dense(T - 5, prefix_tokens=5))
    torch.testing.assert_close(row_BTD[:, 5:], rest_BTD, rtol=0, atol=1e-12)
    if not module.rotary_kind:
        assert module.rotary(ctx) is None
        return
    whole, alone = module.rotary(ctx), module.rotary(dense(T - 7))
    row, rest = module.rotary(dense()), module.rotary(dense(T - 5, prefix_tokens=5))
    for table in ("cos_BTR", "sin_BTR"):
        assert getattr(whole[8], table)[0, 7:].equal(getattr(alone[8], table)[0])
        assert getattr(row[8], table)[:, 5:].equal(getattr(rest[8], table))


def initialise_if_needed(module):
    if any(True for _ in module.parameters()):
        initialise(module, 0)


def test_only_rope_leaves_the_embedding_alone():
    x_BTD = noise(B, T, 16)
    for name, cls in CLASSES.items():
        module = cls(16, **FACTS)
        initialise_if_needed(module)
        assert module.add(x_BTD, dense()).equal(x_BTD) is (name in ("none", "rope"))


def test_sinusoidal_formula():
    x_BTD = Sinusoidal(6, **FACTS).add(torch.zeros(B, T, 6, dtype=torch.float64), dense())
    waves = [10000 ** (-2 * i / 6) for i in range(3)]
    expected = [math.sin(7 * w) for w in waves] + [math.cos(7 * w) for w in waves]
    assert x_BTD[1, 7].tolist() == pytest.approx(expected, abs=1e-12)


def test_learned_is_a_table():
    module = Learned(16, **FACTS, init_std=0.5)
    initialise(module, 0)
    x_BTD = module.add(torch.zeros(B, T, 16), packed([0, 7], [0]))
    assert x_BTD[0, 7:].equal(module.table.weight[: T - 7])
    assert module.table.weight.shape == (64, 16)
    assert module.table.weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("ctx", [dense(65), dense(2, prefix_tokens=63)])
def test_learned_refuses_what_its_table_lacks(ctx):
    module = Learned(16, **FACTS)
    message = "got a document of 65 tokens, expected at most model.max_seq_len=64; raise it"
    with pytest.raises(ValueError, match=message):
        module.add(torch.zeros(B, ctx.positions_BT.shape[1], 16), ctx)


def test_learned_takes_rows_longer_than_its_documents():
    module = Learned(16, max_seq_len=13, rotary_widths=())
    initialise(module, 0)
    assert module.add(torch.zeros(1, T, 16), packed([0, 7])).isfinite().all()


def theirs(scaling, width, *, theta=10000.0, fraction=1.0, **numbers):
    """transformers' (frequencies, scale) under our names."""
    kind = {"ntk": "dynamic"}.get(scaling, scaling)
    rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": fraction, **numbers}
    if "original_max_seq_len" in rope:
        rope["original_max_position_embeddings"] = rope.pop("original_max_seq_len")
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=4096,
        rope_parameters=rope,
    )
    # "dynamic" reaches the factor s at a length of (s + factor - 1) / factor times the trained one
    length = {"seq_len": 2 * 4096} if scaling == "ntk" else {}
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", **length)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("scaling", "numbers", "their_numbers"),
    [
        ("linear", {"factor": 4.0}, {"factor": 4.0}),
        ("ntk", {"factor": 5.0}, {"factor": 4.0}),  # 4 * 2 - (4 - 1) = 5
        ("yarn", {"factor": 8.0, "original_max_seq_len": 2048}, None),
        (
            "yarn",
            {"factor": 40.0, "original_max_seq_len": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
            None,
        ),
        (
            "llama3",
            {
                "factor": 8.0,
                "original_max_seq_len": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            None,
        ),
    ],
)
def test_scaling_equals_transformers(scaling, numbers, their_numbers, width, fraction):
    theta = 500000.0 if scaling == "llama3" else 10000.0
    expected_R, scale = theirs(
        scaling, width, theta=theta, fraction=fraction, **(their_numbers or numbers)
    )
    rope = Rope(
        4 * width,
        max_seq_len=64,
        rotary_widths=(width,),
        theta=theta,
        fraction=fraction,
        scaling=scaling,
        **numbers,
    )
    torch.testing.assert_close(rope.frequencies[width].float(), expected_R, rtol=1e-5, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-12)
    plain = Rope(4 * width, max_seq_len=64, rotary_widths=(width,), theta=theta, fraction=fraction)
    assert not torch.allclose(rope.frequencies[width], plain.frequencies[width])


def test_llama3_defaults_are_the_published_ones():
    numbers = {"scaling": "llama3", "factor": 8.0, "original_max_seq_len": 8192}
    short = Rope(64, max_seq_len=64, rotary_widths=(64,), **numbers)
    full = Rope(
        64, max_seq_len=64, rotary_widths=(64,), **numbers, low_freq_factor=1, high_freq_factor=4
    )
    assert short.frequencies[64].equal(full.frequencies[64])


def test_attention_factor_replaces_the_temperature():
    yarn = {"scaling": "yarn", "factor": 40.0, "original_max_seq_len": 4096}
    tables = [
        Rope(64, max_seq_len=64, rotary_widths=(64,), **yarn, attention_factor=given).rotary(
            dense()
        )
        for given in (None, 1.0)
    ]
    temperature = 0.1 * math.log(40.0) + 1.0
    torch.testing.assert_close(tables[0][64].cos_BTR, temperature * tables[1][64].cos_BTR)
    assert tables[1][64].cos_BTR[0, 0].eq(1).all()


def test_rotation_equals_llama():
    config = LlamaConfig(hidden_size=H * K, num_attention_heads=H, head_dim=K)
    x_BTHK, ctx = noise(B, T, H, K), dense(prefix_tokens=1000)
    cos, sin = LlamaRotaryEmbedding(config)(x_BTHK.float(), ctx.positions_BT)
    expected_BHTK, _ = apply_rotary_pos_emb(
        x_BTHK.transpose(1, 2), x_BTHK.transpose(1, 2), cos, sin
    )
    rotary = Rope(H * K, max_seq_len=64, rotary_widths=(K,)).rotary(ctx)[K]
    got_BTHK, _ = apply_rotary(x_BTHK, None, rotary)
    # at position 1000 their float32 angles are off by up to 6e-5
    torch.testing.assert_close(got_BTHK.transpose(1, 2), expected_BHTK, rtol=0, atol=3e-4)


def test_interleaved_rotation_equals_gptj():
    """Also a fraction: GPT-J turns the first rotary_dim dimensions of a head."""
    config = GPTJConfig(n_embd=H * K, n_head=H, rotary_dim=4, n_positions=64)
    x_BTHK = noise(B, T, H, K)
    table = modeling_gptj.create_sinusoidal_positions(64, config.rotary_dim)[:T].expand(B, T, 4)
    sin, cos = table.chunk(2, dim=-1)
    expected_BTHR = modeling_gptj.apply_rotary_pos_emb(x_BTHK[..., :4], sin, cos)
    rope = Rope(H * K, max_seq_len=64, rotary_widths=(K,), fraction=0.5, interleaved=True)
    got_BTHK, _ = apply_rotary(x_BTHK, None, rope.rotary(dense())[K])
    torch.testing.assert_close(got_BTHK[..., :4], expected_BTHR, rtol=0, atol=1e-5)
    assert got_BTHK[..., 4:].equal(x_BTHK[..., 4:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    """To float32's rounding of cosines, however far: the angles are float64."""
    rope = Rope(K, max_seq_len=64, rotary_widths=(K,), interleaved=interleaved)
    q, k = noise(1, 1, 1, K), noise(1, 1, 1, K, seed=1)

    def score(q_position, k_position):
        contexts = [
            SequenceContext(positions_BT=torch.tensor([[p]]), max_seqlen=1)
            for p in (q_position, k_position)
        ]
        turned = [apply_rotary(x, None, rope.rotary(ctx)[K])[0] for x, ctx in zip((q, k), contexts)]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    for start in (0, 100, 1_000_000):
        assert score(start + 5, start + 2) == pytest.approx(score(5, 2), abs=1e-5)


def test_rotation_keeps_dtype_and_length():
    rotary = Rope(K, max_seq_len=64, rotary_widths=(K,)).rotary(dense())[K]
    assert (rotary.cos_BTR.dtype, rotary.cos_BTR.shape) == (torch.float32, (B, T, K // 2))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        x_BTHK = noise(B, T, H, K).to(dtype)
        turned, _ = apply_rotary(x_BTHK, None, rotary)
        assert turned.dtype == dtype
        lengths = [x.double().norm(dim=-1) for x in (turned, x_BTHK)]
        torch.testing.assert_close(*lengths, rtol=tolerance, atol=tolerance)


def test_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        rope, wave = Rope(16, **FACTS), Sinusoidal(16, **FACTS)
    assert rope.frequencies[8].equal(Rope(16, **FACTS).frequencies[8])
    assert wave.frequencies[16].equal(Sinusoidal(16, **FACTS).frequencies[16])
    assert not dict(rope.named_buffers())


@pytest.mark.parametrize("cls", [Sinusoidal, Learned, Rope])
def test_compiles_as_one_graph(cls):
    torch._dynamo.reset()
    module, x_BTD = cls(16, **FACTS), noise(B, T, 16)
    initialise_if_needed(module)

    def both(x_BTD, ctx):
        rotary = module.rotary(ctx)
        y_BTD = module.add(x_BTD, ctx)
        if rotary is None:
            return y_BTD
        return y_BTD + sum(table.cos_BTR.sum() + table.sin_BTR.sum() for table in rotary.values())

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ctx in (packed([0, 7], [0]), packed([0, 3], [0, 9]), dense()):
        torch.testing.assert_close(compiled(x_BTD, ctx), both(x_BTD, ctx))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0, expected more than 0 .* position=none"),
        ({"fraction": 0.4}, "rotated width of 3 .* expected an even one; set position.fraction"),
        ({"theta": 1.0}, "theta=1.0, expected more than 1; set model.rope_theta"),
        ({"scaling": "longer"}, "scaling='longer', expected one of none, linear, .* set position"),
        ({"factor": 2.0}, "factor, which scaling=none ignores, expected only no number; set"),
        (
            {"scaling": "linear", "factor": 2.0, "beta_fast": 32.0},
            "beta_fast, which scaling=linear ignores, expected only factor; set the others to null",
        ),
        ({"attention_factor": 1.0}, "attention_factor=1.0 with scaling=none, expected a positive"),
        (
            {
                "scaling": "yarn",
                "factor": 2.0,
                "original_max_seq_len": 64,
                "attention_factor": 0.0,
            },
            "attention_factor=0.0 with scaling=yarn, .* set position.attention_factor",
        ),
        ({"scaling": "linear"}, "factor=None with scaling=linear, expected at least 1; set"),
        ({"scaling": "ntk", "factor": 0.5}, "factor=0.5 with scaling=ntk, expected at least 1"),
        ({"scaling": "ntk", "factor": 2.0, "fraction": 0.25}, "rotated width of 2 .* at least 4"),
        (
            {"scaling": "yarn", "factor": 2.0},
            "original_max_seq_len=None with scaling=yarn, expected a positive number; set",
        ),
        (
            {
                "scaling": "llama3",
                "factor": 2.0,
                "original_max_seq_len": 64,
                "low_freq_factor": 4.0,
            },
            "low_freq_factor=4.0 and high_freq_factor=4.0, expected the first to be smaller",
        ),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=f"position=rope: got (a )?{message}"):
        Rope(16, **FACTS, **knobs)


def test_odd_width_has_no_waves():
    with pytest.raises(ValueError, match="sinusoidal: got d_model=5, expected an even width; set"):
        Sinusoidal(5, **FACTS)


def test_rotary_wider_than_the_head():
    rotary = Rope(16, max_seq_len=64, rotary_widths=(16,)).rotary(dense())[16]
    assert isinstance(rotary, Rotary)
    with pytest.raises(ValueError, match="width of 16, expected at most the head's 8; set the"):
        apply_rotary(noise(B, T, H, K), None, rotary)


def test_angles_are_exact_far_out():
    """float32 products would be off by 0.03 radians at a million."""
    far = position.angles(torch.tensor([[1_000_000]]), position.host_tensor((0.7,)))
    assert far.item() == pytest.approx(700_000.0, abs=1e-6)


def test_every_width_has_its_own_angles():
    """Mixers whose heads differ in width mix freely: each gets what it would get alone."""
    ctx, knobs = packed([0, 7], [0]), {"theta": 500.0, "fraction": 0.5}
    both = Rope(16, max_seq_len=64, rotary_widths=(8, 24), **knobs).rotary(ctx)
    assert list(both) == [8, 24]
    for width in both:
        alone = Rope(16, max_seq_len=64, rotary_widths=(width,), **knobs).rotary(ctx)[width]
        assert both[width].cos_BTR.shape == (B, T, width // 4)
        assert both[width].cos_BTR.equal(alone.cos_BTR)
        assert both[width].sin_BTR.equal(alone.sin_BTR)


@pytest.mark.parametrize("kind", [Rope, Sinusoidal])
def test_frequencies_go_with_the_module_and_stay_float64(kind):
    position = kind(8, **FACTS)
    before = {width: x.clone() for width, x in position.frequencies.items()}
    position.to(torch.bfloat16).to("meta")  # no values there: they stay where they were
    assert before
    assert position.frequencies.keys() == before.keys()
    for width, frequencies_R in position.frequencies.items():
        assert frequencies_R.dtype == torch.float64
        assert frequencies_R.equal(before[width])
