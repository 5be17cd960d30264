"""transformers' Mamba-2 as an independent implementation of the model."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2 as theirs_code

from llmtrain.context import SequenceContext
from llmtrain.export.mamba2 import mamba2_config, mamba2_weights, to_mamba2

SMALL = (
    "model.d_model=24",
    "model.n_layers=3",
    "model.init_std=0.2",
    "model.max_seq_len=64",
    "mixer.d_state=10",
    "mixer.head_dim=6",
    "mixer.n_groups=4",
    "mixer.chunk=8",
    "mixer.dt_limit=[0.0,.inf]",  # as published
)
OPTIONS = {"mixer": "mamba2", "channel": "none", "position": "none"}
TIED = ("model.tie_embeddings=true", "model.tie_embeddings=false")
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture
def float64_mamba2(monkeypatch):
    """transformers rounds to float32 inside; in float64 that would set the tolerance."""

    def normalised(x, weight, eps):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def norm(self, hidden_states):
        return normalised(hidden_states, self.weight, self.variance_epsilon)

    def gated_norm(self, hidden_states, gate):
        gated = (hidden_states * F.silu(gate)).unflatten(-1, (-1, self.group_size))
        return self.weight * normalised(gated, 1.0, self.variance_epsilon).flatten(-2)

    monkeypatch.setattr(theirs_code.Mamba2RMSNorm, "forward", norm)
    monkeypatch.setattr(theirs_code.MambaRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_logits_loss_and_gradients(
    build_model, shuffle_norms, float64_mamba2, same_function, tied, bias, backend
):
    biases = (f"mixer.bias={bias}", f"mixer.conv_bias={not bias}", f"mixer.backend={backend}")
    model = shuffle_norms(build_model(*SMALL, tied, *biases, **OPTIONS))
    same_function(model, to_mamba2(model), mamba2_weights, **CLOSE)


@pytest.mark.parametrize("tied", TIED)
def test_greedy_generation_token_for_token(build_model, shuffle_norms, same_greedy_text, tied):
    model = shuffle_norms(build_model(*SMALL, tied, dtype=torch.float32, **OPTIONS))
    same_greedy_text(model, to_mamba2(model))


def test_float32_and_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, TIED[0], dtype=torch.float32, **OPTIONS))
    to_mamba2(model).save_pretrained(tmp_path)
    mamba2 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, mamba2(tokens).logits, atol=2e-5, rtol=1e-4)


def test_configuration(build_model):
    """Every size under its own name: no two of them are equal here."""
    config = mamba2_config(build_model(*SMALL, TIED[0], **OPTIONS))
    assert (config.hidden_size, config.expand, config.num_heads, config.head_dim) == (24, 2, 8, 6)
    assert (config.state_size, config.n_groups, config.conv_kernel) == (10, 4, 4)
    assert (config.num_hidden_layers, config.vocab_size, config.chunk_size) == (3, 50, 8)
    assert config.tie_word_embeddings
    assert not config.use_bias
    assert config.use_conv_bias
    assert tuple(config.time_step_limit) == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("preset", "layers", "groups", "vocab", "count"),
    [("mamba2_370m", 48, 1, 50288, 368_346_624), ("mamba2_8b", 56, 8, 256000, 8_236_999_680)],
)
def test_published_sizes(build_model, preset, layers, groups, vocab, count):
    """The sizes of the presets are those under which transformers counts the same parameters."""
    changes = ("mixer.dt_limit=[0.0,.inf]", "mixer.chunk=256", f"mixer.n_groups={groups}")
    changes = (*changes, "model.vocab_size=null")  # the padded one, as the release counts it
    build = {"vocab_size": vocab, "device": "meta", "dtype": torch.float32}
    model = build_model(*changes, **{**OPTIONS, "model": preset}, **build)
    width = 4096 if preset == "mamba2_8b" else 1024
    published = Mamba2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=2 * width // 64,
        n_groups=groups,
        tie_word_embeddings=preset == "mamba2_370m",
        residual_in_fp32=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert mamba2_config(model).to_dict() == published.to_dict()
    with torch.device("meta"):
        assert Mamba2ForCausalLM(published).num_parameters() == count
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([], {"channel": "swiglu"}, "layer 0, channel: got SwiGLU, .*expected none; train"),
        ([], {"position": "learned"}, "position: got Learned, .*expected position=none"),
        ([], {"norm": "layernorm"}, "norm1: got LayerNorm, .*expected norm=rmsnorm"),
        (["mixer.norm_groups=1"], {}, "got norm_groups=1, .*expected mixer.norm_groups=null"),
        (["mixer.norm_before_gate=true"], {}, "got norm_before_gate=true, .*_gate=false"),
        (["mixer.norm_eps=0.1"], {}, "got norm_eps=0.1, .*last norm's 1e-05 everywhere"),
        (["embedding.scale=2.0"], {}, "embedding: got scale=2.0"),
        (
            ["mixers.b.head_dim=12", "mixers.b.d_state=10", "stack.pattern=[a,b,a]"],
            {"mixers": {"b": "mamba2"}},
            "stack: got layers that differ, .*expected one shape and one dt_limit",
        ),
        (
            ["stack.pattern=[a,b,a]"],
            {"mixers": {"b": "mha"}},
            "layer 1, mixer: got Attention, .*expected mamba2",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    model = build_model(*SMALL, *changes, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match=f"export to Mamba2: .*{message}"):
        to_mamba2(model)
