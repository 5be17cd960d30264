"""Width transfer: what grows, first values, factors of logits and scores, export, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.export.llama import llama_config, to_llama

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = sorted(f"mixer={file.stem}" for file in (ROOT / "configs" / "mixer").glob("*.yaml"))
OPTIONS += sorted(f"channel={file.stem}" for file in (ROOT / "configs" / "channel").glob("*.yaml"))
OPTIONS += sorted(f"stack={file.stem}" for file in (ROOT / "configs" / "stack").glob("*.yaml"))
QUICK = ("mixer=mamba", "mixer=mamba2", "mixer=mla", "channel=moe", "stack=recurrent_depth")
EVERY = [o if o in QUICK else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS]
BASE = ("tokenizer.vocab_size=300", "model.vocab_size=300")


def model_of(*overrides: str, device: str = "cpu"):
    config = compose("train", [*BASE, *overrides])
    return build.build_model(config, vocab_size=300, device=device)


def kind(model, name: str) -> str:
    """In words: h hidden, f to a fixed size, - as at the base; a letter for each packed part."""
    growth = model.width.growth[name.replace("0.", "stack.blocks.0.", 1)]
    if not growth.reads:
        return "-" * len(growth.rows)
    return "".join("h" if grows else "f" for _, grows in growth.rows)


KINDS = {
    "mqa": {"q_proj.weight": "h", "k_proj.weight": "f", "out_proj.weight": "h"},
    "mla": {"q_up.weight": "h", "kv_down.weight": "ff", "kv_up.weight": "-"},
    "mamba": {"in_proj.weight": "hh", "x_proj": "hff", "dt_proj": "h", "A_log": "-"},
    "mamba2": {"in_proj.weight": "hhffh", "conv_weight": "-", "A_log": "-"},
    "gated_deltanet": {"qkv_proj.weight": "hhh", "a_proj.weight": "h", "norm.weight": "-"},
    "mlstm": {"gate_proj.weight": "h", "gate_bias": "-", "norm.weight": "-"},
    "slstm": {"zo_proj.weight": "-", "recurrent": "-", "conv_weight": "-"},
}


@pytest.mark.parametrize("mixer", KINDS)
def test_what_grows(mixer):
    model = model_of(f"mixer={mixer}", "channel=moe", "model.mup_base_width=32", device="meta")
    for name, expected in KINDS[mixer].items():
        assert kind(model, f"0.mixer.{name}") == expected, name
    assert kind(model, "0.channel.router.weight") == "f"
    assert kind(model, "0.channel.gate_up") == "hh"
    assert kind(model, "0.norm1.weight") == "-"
    assert kind(model, "embedding.weight") == "-"


def test_numbers_of_their_own_do_not_grow():
    options = ("model.mup_base_width=32", "channel.hidden=50")
    model = model_of(*options, "mixer=mla", "mixer.kv_lora_rank=24", device="meta")
    assert kind(model, "0.channel.gate_up.weight") == "ff"
    assert kind(model, "0.channel.down.weight") == "-"
    assert kind(model, "0.mixer.kv_down.weight") == "ff"


def test_wider_heads_grow_instead_of_their_number():
    sizes = ("model.n_heads=4", "model.mup_base_width=32", "model.mup_base_head_dim=8")
    model = model_of("mixer=slstm", *sizes, device="meta")
    assert kind(model, "0.mixer.zo_proj.weight") == "h"
    assert kind(model, "0.mixer.recurrent") == "h"
    assert kind(model, "0.mixer.gate_bias") == "-"
    model = model_of("mixer=mlstm", *sizes, device="meta")
    assert kind(model, "0.mixer.gate_proj.weight") == "f"


@pytest.mark.parametrize("option", EVERY)
def test_first_values_follow_the_table_whatever_draws_them(option):
    """Measured against the base: hidden 1 / sqrt(m), to a fixed size 1 / m, all else 1. A parameter
    with an initialisation of its own that follows the width fails unless scaled_init names it."""
    m, small, large = 4, 64, 256
    heads = ("model.n_heads={}", "model.n_kv_heads={}")
    grown = [
        model_of(
            option,
            f"model.d_model={width}",
            *([] if option == "channel=none" else [f"model.ffn_hidden={2 * width}"]),
            *(text.format(width // 16) for text in heads if reads(option, text)),
            f"model.mup_base_width={small}",
        )
        for width in (small, large)
    ]
    base, wide = (dict(model.named_parameters()) for model in grown)
    width = grown[1].width
    for name, parameter in wide.items():
        growth = width.growth[name]
        count = [rows for rows, _ in growth.rows]
        there = [rows for rows, _ in grown[0].width.growth[name].rows]
        if parameter.ndim < 2:
            continue
        parts = zip(parameter.split(count, -2), base[name].split(there, -2), growth.rows)
        for now, before, (_, grows) in parts:
            wanted = (m**-0.5 if grows else 1 / m) if growth.reads else 1.0
            if before.numel() < 64 or not before.any():
                continue
            ratio = (now.std() / before.std()).item()
            assert ratio == pytest.approx(wanted, rel=0.25), (name, now.shape)


def reads(option: str, text: str) -> bool:
    """Whether the chosen mixer reads a size of the model."""
    name = option.removeprefix("mixer=") if option.startswith("mixer=") else "attention"
    file = ROOT / "configs" / "mixer" / f"{name}.yaml"
    return f"${{{text.partition('=')[0]}}}" in file.read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_changes_at_the_base_and_logits_shrink_beyond_it(tied):
    knob = f"model.tie_embeddings={tied}"
    plain, base, wide = (
        model_of(knob, *more)
        for more in ((), ("model.mup_base_width=128",), ("model.mup_base_width=32",))
    )
    for a, b in zip(plain.parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)
    tokens = torch.arange(20)[None]
    ctx = SequenceContext.dense(1, 20)
    outputs = [m.logits(m(tokens, ctx).hidden_BTD) for m in (plain, base)]
    assert torch.equal(*outputs)
    hidden = torch.randn(2, 128)
    torch.testing.assert_close(wide.logits(hidden), wide.head(hidden)[:, :300] / 4)
    state = wide.init_state(1, 21)
    ctx = SequenceContext.dense(1, 20)
    prefill = wide(tokens, ctx, state)
    step, _ = wide.step(tokens[:, 0], prefill.state)
    row = torch.cat([tokens, tokens[:, :1]], dim=1)
    whole = wide.logits(wide(row, SequenceContext.dense(1, 21)).hidden_BTD)
    torch.testing.assert_close(step, whole[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["null", "0.5"])
def test_scores_of_heads_that_grow(given):
    sizes = ("model.n_heads=4", "model.mup_base_width=32", "model.mup_base_head_dim=8")
    model = model_of(*sizes, f"mixer.softmax_scale={given}")
    at_base = 0.5 if given == "0.5" else 8**-0.5
    assert model.stack.blocks[0].mixer.softmax_scale == pytest.approx(at_base / 4)
    model = model_of(*sizes, "mixer=mla", f"mixer.softmax_scale={given}")
    at_base = 0.5 if given == "0.5" else 12**-0.5
    assert model.stack.blocks[0].mixer.scale == pytest.approx(at_base / 4)
    model = model_of("model.mup_base_width=32", f"mixer.softmax_scale={given}")
    assert model.stack.blocks[0].mixer.softmax_scale == (None if given == "null" else 0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_export_takes_the_factor_of_the_logits_into_the_last_gain(tied):
    model = model_of(f"model.tie_embeddings={tied}", "model.mup_base_width=32").double()
    model.compute_dtype = torch.float64
    tokens = torch.arange(20)[None]
    ours = model.logits(model(tokens, SequenceContext.dense(1, 20)).hidden_BTD)
    assert model.logit_scale == 0.25
    torch.testing.assert_close(to_llama(model)(tokens).logits, ours, atol=1e-5, rtol=1e-5)


def test_export_refuses_scores_that_llama_cannot_scale():
    model = model_of("model.mup_base_width=32", "model.mup_base_head_dim=8")
    with pytest.raises(ValueError, match=r"Llama: layer 0, mixer: got softmax_scale=0.08"):
        llama_config(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mup_base_width=0"], r"model.mup_base_width: got 0, expected more than 0"),
        (["model.mup_base_head_dim=8"], r"mup_base_head_dim: got 8 with model.mup_base_width=null"),
        (
            ["model.mup_base_width=64", "model.mup_base_head_dim=8"],
            r"mup_base_head_dim: got 8 for heads of 32 at model.d_model=128, .*, from 16; set",
        ),
    ],
)
def test_messages(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("train", [*BASE, *overrides])
