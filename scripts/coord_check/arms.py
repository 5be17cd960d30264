"""What is checked: overrides that choose a model, and how its sizes grow with the width."""

from __future__ import annotations

import re
from pathlib import Path

from llmtrain.config import compose

ROOT = Path(__file__).resolve().parents[2]
BASE, HEAD = 64, 16  # width of the base, and of its heads
VOCAB = 64
MIXERS = sorted(file.stem for file in (ROOT / "configs" / "mixer").glob("*.yaml"))
ARMS: dict[str, list[str]] = {name: [f"mixer={name}"] for name in MIXERS}
ARMS["sliding_window"] += ["mixer.window=8"]  # of 32 tokens
ARMS |= {
    "moe": ["channel=moe", "channel.n_experts=4"],
    "moe_fixed_experts": ["channel=moe", "channel.n_experts=4", "channel.hidden=50"],
    "hybrid": ["mixer=gated_deltanet", "stack=hybrid", "stack.pattern=ab"],
    "recurrent_depth": [
        *("stack=recurrent_depth", "stack.sampling=fixed", "stack.repeats=2"),
        *("stack.backprop_repeats=null", "stack.prelude=0"),
    ],
    "shared_attention": ["mixer=mamba", "stack=shared_attention", "stack.pattern=ba"],
    "peri": ["stack.norm_position=peri"],
    "untied": ["model.tie_embeddings=false"],
    "qk_norm": ["model.qk_norm=true"],
    "wider_heads": [],
    "wider_heads_mla": ["mixer=mla"],
    "wider_heads_mlstm": ["mixer=mlstm"],
    "muon": ["optimizer=muon"],
    "muon_original": ["optimizer=muon", "optimizer.lr_scaling=original"],
    "muon_mamba2": ["optimizer=muon", "mixer=mamba2"],
}


def scaled(arm: str, width: int) -> list[str]:
    """The sizes of a model of that width: everything grows in proportion from the base."""
    times, rest = divmod(width, BASE)
    if rest or times < 1:
        raise ValueError(f"width: got {width}, expected a multiple of {BASE}; give such widths")
    wider_heads = arm.startswith("wider_heads")
    heads = (BASE // HEAD) * (1 if wider_heads else times)
    sizes = {"d_model": width, "ffn_hidden": width * 5 // 2, "n_heads": heads}
    sizes["n_kv_heads"] = max(heads // 2, 1)
    read = read_by(arm)
    return [f"model.{key}={x}" for key, x in sizes.items() if key in read]


def read_by(arm: str) -> set[str]:
    """The model's sizes that the parts of an arm read; others may not be given."""
    chosen = [word.removeprefix("mixer=") for word in ARMS[arm] if word.startswith("mixer=")]
    mixers = chosen or ["attention"]
    if {"stack=hybrid", "stack=shared_attention"} & set(ARMS[arm]):
        mixers += ["attention"]
    files = [ROOT / "configs" / "mixer" / f"{name}.yaml" for name in mixers]
    found = {key for file in files for key in re.findall(r"\$\{model\.(\w+)\}", file.read_text())}
    fixed = any(word.startswith("channel.hidden=") for word in ARMS[arm])
    return found | {"d_model"} | (set() if fixed else {"ffn_hidden"})


def configuration(arm: str, width: int, *, mup: bool, lr: float, seed: int, layers: int) -> dict:
    """A training configuration of one model."""
    overrides = [*ARMS[arm], *scaled(arm, width), f"seed={seed}", f"model.n_layers={layers}"]
    overrides += [f"tokenizer.vocab_size={VOCAB}", f"model.vocab_size={VOCAB}"]
    # 1 / sqrt(fan in), at the base in muP: the two parametrisations differ at other widths only
    overrides += [f"model.init_std={(BASE if mup else width) ** -0.5}"]
    overrides += [f"optimizer.lr={lr}", "optimizer.weight_decay=0.0"]
    if "optimizer=muon" in overrides:
        overrides += [f"optimizer.adamw_lr={lr}"]
        if "optimizer.lr_scaling=original" in overrides:
            overrides += [f"optimizer.lr={1.6 * lr}"]  # as match_rms_adamw at the base
    if mup:
        overrides += [f"model.mup_base_width={BASE}"]
        if arm.startswith("wider_heads"):
            overrides += [f"model.mup_base_head_dim={HEAD}"]
    return compose("train", overrides)
