"""What is trained: small models, every mixer at every ZeRO stage, the other axes dealt out.

Mixers and stages are crossed; each other axis is a deck of its options that is dealt, shuffled,
over the cells, so that all its options come equally often. New YAML files of mixers join by
themselves.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from itertools import product

from omegaconf import OmegaConf

from llmtrain import groups
from llmtrain.config import hydra_compose
from llmtrain.validate import READ_BY_BUILD, interpolated

ROWS, TOKENS = 12, 32  # rows of a step: 1, 2, 3 ranks with 1 or 2 micro-batches each divide them
SAVE_EVERY, LOG_EVERY, VAL_EVERY, KEEP = 4, 3, 6, 2
STAGES = (0, 1, 2, 3)
# Channel -> overrides. The router's bias is state that no gradient reaches.
CHANNELS = {
    "swiglu": ("channel=swiglu",),
    "moe": ("channel=moe", "channel.n_experts=4", "channel.bias_update_speed=0.01"),
    "moe_balanced": ("channel=moe", "channel.n_experts=4"),
    "gelu": ("channel=gelu",),
}
STACKS = {
    "decoder": ("stack=decoder",),
    "recurrent_depth": ("stack=recurrent_depth", "stack.repeats=2", "model.n_layers=3"),
    "hybrid": ("stack=hybrid", "model.n_layers=4"),
    "shared_attention": ("stack=shared_attention", "model.n_layers=4"),
}
# Axis -> its deck, dealt over the cells.
DECKS = {
    "ranks": (2, 1, 2, 3),
    "micro_steps": (1, 2),
    "validation": (True, False, True),
    "save": ("async", "sync"),
    "channel": ("swiglu", "moe", "moe", "moe_balanced", "gelu"),
    "stack": ("decoder", "decoder", "recurrent_depth", "hybrid", "shared_attention"),
    "objective": ("causal", "causal", "multi_token"),
    "optimizer": ("adamw", "muon"),
}
# Muon needs whole matrices: the trainer refuses it where the weights are divided.
MUON_STAGES = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the matrix and how often it is killed. save: sync or async."""

    mixer: str
    stage: int
    ranks: int
    micro_steps: int
    validation: bool
    save: str
    channel: str
    stack: str
    objective: str
    optimizer: str
    kills: int
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Mixer and stage, and what is not plain about the rest."""
        parts = [self.mixer, f"zero{self.stage}", f"{self.ranks}x{self.micro_steps}", self.save]
        parts += [self.channel, self.stack, self.objective, self.optimizer]
        return "-".join([*parts, "val" if self.validation else "noval"])

    @property
    def key(self) -> str:
        """Changes with whatever would change the cell's run, the code aside."""
        content = {"cell": asdict(self), "overrides": self.overrides()}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Enough that every kill finds saves ahead of it."""
        return SAVE_EVERY * (2 * self.kills + 1) + 1

    def overrides(self) -> list[str]:
        """The training, without its corpus, run folder and manner of saving."""
        typed = [
            f"mixer={self.mixer}",
            *CHANNELS[self.channel],
            *STACKS[self.stack],
            f"objective={self.objective}",
            f"optimizer={self.optimizer}",
            f"deepspeed=zero{self.stage}",
        ]
        typed += [size for size in SIZES if size.partition("=")[0] not in keys(typed)]
        return [
            *effective(typed),
            f"train.seq_len={TOKENS}",
            f"train.global_batch_tokens={ROWS * TOKENS}",
            f"train.total_tokens={self.steps * ROWS * TOKENS}",
            f"train.micro_batch={ROWS // self.ranks // self.micro_steps}",
            f"train.log_every={LOG_EVERY}",
            f"train.val_every={VAL_EVERY if self.validation else 10**6}",
            f"train.val_tokens={8 * TOKENS}",
            f"train.save_every={SAVE_EVERY}",
            f"train.keep={KEEP}",
            f"train.device={self.device}",
            f"train.deterministic={'true' if self.device == 'cuda' else 'false'}",
            "tracker=none",
        ]

    def saving(self, how: str | None = None) -> list[str]:
        """How checkpoints are written: sync, async; None: as the cell says."""
        if not has_async():
            return []
        return [f"train.async_save={'true' if (how or self.save) == 'async' else 'false'}"]


SIZES = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=24",
)


def keys(overrides: list[str]) -> set[str]:
    return {override.partition("=")[0] for override in overrides}


def effective(typed: list[str]) -> list[str]:
    """Without the sizes of the model that no chosen part reads: those are refused."""
    chosen = [override for override in typed if not override.startswith("model.")]
    raw, _ = hydra_compose("train", chosen, ())
    read = READ_BY_BUILD | interpolated(OmegaConf.to_container(raw, resolve=False), "model")
    return [o for o in typed if o in chosen or o.partition("=")[0].partition(".")[2] in read]


def has_async() -> bool:
    """Whether this version of the trainer can save in the background."""
    return any(line.strip().startswith("async_save:") for line in groups.keys_text("train"))


def deal(options: tuple, count: int, seed: str) -> list:
    """That many cards of a deck that is shuffled anew whenever it ran out."""
    draw = random.Random(seed)
    dealt: list = []
    while len(dealt) < count:
        dealt += draw.sample(options, len(options))
    return dealt[:count]


def matrix(
    *,
    kills: int,
    seed: int,
    device: str = "cpu",
    mixers: list[str] | None = None,
    stages: tuple[int, ...] = STAGES,
    ranks: tuple[int, ...] = (1, 2, 3),
) -> list[Cell]:
    """The cells: together at least `kills` kills, equally many in each, in an order by the seed."""
    found = groups.options()
    pairs = list(product(mixers or found["mixer"], stages))
    columns = {}
    for axis, deck in DECKS.items():
        options = tuple(n for n in deck if n in ranks) if axis == "ranks" else deck
        if axis == "optimizer":
            options = tuple(name for name in deck if name in found["optimizer"])
        if axis == "save" and not has_async():
            options = ("sync",)
        columns[axis] = deal(options or ranks, len(pairs), f"{seed}/{axis}")
    cells = []
    for i, (mixer, stage) in enumerate(pairs):
        dealt = {axis: column[i] for axis, column in columns.items()}
        if stage not in MUON_STAGES:
            dealt["optimizer"] = "adamw"
        each = -(-kills // len(pairs))
        cells.append(Cell(mixer=mixer, stage=stage, kills=each, device=device, **dealt))
    random.Random(seed).shuffle(cells)
    return cells
