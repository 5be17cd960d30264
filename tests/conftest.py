"""Models for tests: real ones from the shipped YAML files, and one around a mixer of its own."""

from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from llmtrain import build
from llmtrain.channels.mlp import Relu2, SwiGLU
from llmtrain.mixers.base import Mixer
from llmtrain.model.block import Block
from llmtrain.model.embedding import Embedding
from llmtrain.model.init import depth_std, initialise
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.linear import Linear
from llmtrain.model.norm import RMSNorm
from llmtrain.model.position import NoPosition
from llmtrain.model.stack import Stack

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = {
    "model": "tiny",
    "embedding": "learned",
    "position": "rope",
    "mixer": "attention",
    "channel": "swiglu",
    "norm": "rmsnorm",
    "stack": "decoder",
    "objective": "causal",
}


class Leaky(Mixer):
    """A mixer unlike attention: s_t = decay * s_(t-1) + x_t inside a document; y = W s."""

    def __init__(self, d_model, *, layer_idx, n_layers, decay=0.7):
        super().__init__()
        self.d_model, self.decay = d_model, decay
        self.out = Linear(d_model, d_model, init_std=depth_std(0.1, n_layers))

    def forward(self, x_BTD, ctx, state=None):
        s_BD = x_BTD.new_zeros(x_BTD.shape[0], self.d_model) if state is None else state["s"]
        outputs = []
        for t in range(x_BTD.shape[1]):
            if ctx.doc_ids_BT is not None and t > 0:
                same_B = ctx.doc_ids_BT[:, t] == ctx.doc_ids_BT[:, t - 1]
                s_BD = torch.where(same_B[:, None], s_BD, 0)
            s_BD = self.decay * s_BD + x_BTD[:, t]
            outputs.append(s_BD)
        y_BTD = self.out(torch.stack(outputs, dim=1))
        return y_BTD, None if state is None else {"s": s_BD}

    def init_state(self, batch, *, max_tokens, device, dtype):
        return {"s": torch.zeros(batch, self.d_model, device=device, dtype=dtype)}

    def step(self, x_BD, ctx, state):
        s_BD = self.decay * state["s"] + x_BD
        return self.out(s_BD), {"s": s_BD}

    def flops_per_token(self, tokens):
        return self.out.flops_per_token()

    def state_bytes(self, tokens, dtype=torch.bfloat16):
        return self.d_model * dtype.itemsize


@pytest.fixture
def model_config():
    """model_config("model.d_model=32", channel="gelu", mixers={"b": "mqa"}): the model's groups of
    a configuration, with options by keyword and changes as dotted keys. What a stack's file mounts
    has to be given."""

    def make(*changes, mixers=None, channels=None, **options):
        chosen = {**OPTIONS, **options}
        nodes = {g: OmegaConf.load(CONFIGS / g / f"{o}.yaml") for g, o in chosen.items()}
        nodes["stack"].pop("defaults", None)
        for group, letters in (("mixer", mixers), ("channel", channels)):
            nodes[f"{group}s"] = {
                letter: OmegaConf.load(CONFIGS / group / f"{option}.yaml")
                for letter, option in (letters or {}).items()
            }
        config = OmegaConf.create({"seed": 0, **nodes})
        config.merge_with_dotlist(list(changes))
        return {**OmegaConf.to_container(config, resolve=True), "choices": chosen}

    return make


@pytest.fixture
def build_model(model_config):
    """build_model(<as model_config>, vocab_size=50, dtype=torch.float64): by llmtrain.build."""

    def make(*changes, vocab_size=50, dtype=torch.float64, device="cpu", **options):
        config = model_config(*changes, **options)
        model = build.build_model(config, vocab_size=vocab_size, device=device, compute_dtype=dtype)
        return model.double() if dtype == torch.float64 else model

    return make


@pytest.fixture
def make_blocks():
    """make_blocks(n): n blocks of the leaky mixer."""

    def make(n, *, d_model=16, norm_position="pre", activation_l1=None):
        blocks = []
        for i in range(n):
            facts = {"layer_idx": i, "n_layers": n}
            channel = (
                SwiGLU(d_model, hidden=24, init_std=0.1, **facts)
                if activation_l1 is None
                else Relu2(d_model, hidden=24, init_std=0.1, activation_l1=activation_l1, **facts)
            )
            mixer = Leaky(d_model, **facts)
            norm = partial(RMSNorm, d_model)
            blocks.append(Block(mixer, channel, norm, norm_position=norm_position))
        return blocks

    return make


@pytest.fixture
def make_model(make_blocks):
    """make_model(): a float64 model of leaky blocks, 19 tokens in 24 rows."""

    def make(n=3, *, tied=True, dtype=torch.float64, seed=0, stack=Stack, **blocks):
        model = LanguageModel(
            embedding=Embedding(16, vocab_size=24, tied=tied, init_std=0.2),
            position=NoPosition(16, max_seq_len=64, rotary_widths=()),
            stack=stack(make_blocks(n, **blocks)),
            norm=RMSNorm(16),
            vocab_size=19,
            padded_vocab_size=24,
            compute_dtype=dtype,
        )
        initialise(model, seed)
        return model.to(dtype)

    return make
