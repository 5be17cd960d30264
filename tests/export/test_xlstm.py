"""transformers' xLSTM as an independent implementation of the model."""

import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.export.llama import to_llama
from llmtrain.export.xlstm import to_xlstm, xlstm_config, xlstm_weights

# Widths of queries and values are multiples of 64, as their cache wants.
SMALL = (
    "model.d_model=128",
    "model.n_layers=3",
    "model.n_heads=4",
    "model.ffn_hidden=72",
    "model.init_std=0.1",
    "model.norm_eps=1e-6",
    "mixer.chunk=7",  # theirs goes over to another code for what is left of 21 tokens
    "mixer.gate_soft_cap=4.0",
    "mixer.input_gate_bias=-0.5",
    "mixer.forget_gate_bias=[0.0,3.0]",
    "mixer.gate_init_std=0.2",
    "embedding.logit_softcap=3.0",
    "embedding.init_std=0.3",
)
OPTIONS = {"mixer": "mlstm", "position": "none"}
TIED = ("model.tie_embeddings=true", "model.tie_embeddings=false")
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture
def float64_xlstm(monkeypatch):
    """transformers rounds to float32 in its norms and of its logits, which would set the
    tolerance."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_logits_loss_and_gradients(
    build_model, float64_xlstm, shuffle_norms, same_function, backend
):
    model = build_model(*SMALL, TIED[1], f"mixer.backend={backend}", **OPTIONS)
    xlstm = to_xlstm(shuffle_norms(model))
    xlstm.config.use_cache = False  # it is written in place, which autograd refuses
    same_function(model, xlstm, xlstm_weights, **CLOSE)


def test_their_loss(build_model, float64_xlstm, shuffle_norms, random_tokens):
    """A tied head is copied, and their own loss is ours."""
    model = shuffle_norms(build_model(*SMALL, TIED[0], **OPTIONS))
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    theirs = to_xlstm(model)(tokens, labels=tokens)
    torch.testing.assert_close(logits, theirs.logits, **CLOSE)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, theirs.loss, **CLOSE)


@pytest.mark.parametrize("tied", TIED)
def test_greedy_generation_token_for_token(build_model, shuffle_norms, same_greedy_text, tied):
    """Theirs keeps float32 states, so both are float32 here."""
    model = shuffle_norms(build_model(*SMALL, tied, dtype=torch.float32, **OPTIONS))
    same_greedy_text(model, to_xlstm(model))


def test_float32_and_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, TIED[0], dtype=torch.float32, **OPTIONS))
    to_xlstm(model).save_pretrained(tmp_path)
    xlstm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    # each is about 3e-6 from float64: small keys magnify rounding
    assert (logits - xlstm(tokens).logits).norm() / logits.norm() < 1e-5


def test_published_7b(build_model):
    """The sizes of the preset are transformers' defaults, which are those of NX-AI/xLSTM-7b."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    model = build_model(
        "embedding.logit_softcap=30.0",
        model="xlstm_7b",
        vocab_size=50304,
        device="meta",
        dtype=torch.float32,
        **OPTIONS,
    )
    published = xLSTMConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    assert xlstm_config(model).to_dict() == published.to_dict()
    with torch.device("meta"):
        assert xLSTMForCausalLM(published).num_parameters() == 6_865_424_896
    assert sum(p.numel() for p in model.parameters()) == 6_865_424_896


@pytest.mark.parametrize("hidden", [64, 72, 300, 384])
def test_widths_survive_their_rounding(build_model, hidden):
    model = build_model(*SMALL, f"model.ffn_hidden={hidden}", **OPTIONS)
    assert to_xlstm(model).backbone.blocks[0].ffn.up_proj_dim == hidden


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([], {"channel": "gelu"}, "layer 0, channel: got Gelu, .*expected swiglu; train"),
        ([], {"position": "learned"}, "position: got Learned, .*expected position=none"),
        ([], {"norm": "layernorm"}, "norm1: got LayerNorm, .*expected norm=rmsnorm"),
        (["embedding.logit_softcap=null"], {}, "embedding: got logit_softcap=null, .*a number"),
        (["mixer.input_gate=sigmoid"], {}, "got input_gate=sigmoid, .*mixer.input_gate=exp"),
        (["mixer.d_conv=4"], {}, "got d_conv=4, .*mixer.d_conv=null"),
        (["mixer.gate_soft_cap=null"], {}, "got gate_soft_cap=null, .*or another number"),
        (["mixer.bias=true"], {}, "layer 0, mixer: got bias=true, .*mixer.bias=false"),
        (["channel.bias=true"], {}, "layer 0, channel: got bias=true, .*channel.bias=false"),
        (["mixer.head_norm=rmsnorm"], {}, "got head_norm=rmsnorm, .*mixer.head_norm=layernorm"),
        (["mixer.norm_eps=0.1"], {}, "got norm_eps=0.1, .*expected the other norms' 1e-06"),
        (
            ["mixers.b.gate_soft_cap=1.0", "stack.pattern=[a,b,a]"],
            {"mixers": {"b": "mlstm"}},
            "stack: got layers that differ, .*one gate_soft_cap for all layers",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    model = build_model(*SMALL, *changes, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match=f"export to xLSTM: .*{message}"):
        to_xlstm(model)


def test_other_families_refuse_the_soft_cap(build_model):
    model = build_model("embedding.logit_softcap=30.0")
    with pytest.raises(ValueError, match=r"export to Llama: embedding: got logit_softcap=30.0, "):
        to_llama(model)
