"""transformers' Llama as an independent implementation of the model."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmtrain.context import SequenceContext
from llmtrain.export.common import dense_weights, transformers_model
from llmtrain.export.llama import llama_config, to_llama
from llmtrain.objectives.causal import Causal

SMALL = (
    "model.d_model=48",
    "model.n_layers=3",
    "model.n_heads=6",
    "model.n_kv_heads=2",
    "model.head_dim=10",
    "model.ffn_hidden=56",
    "model.init_std=0.2",
    "model.max_seq_len=64",
    "model.rope_theta=500.0",
    "mixer.backend=reference",
)
TIED = ("model.tie_embeddings=true", "model.tie_embeddings=false")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", TIED)
def test_logits_loss_and_gradients(
    build_model, shuffle_norms, float64_norm, random_tokens, same_function, tied, bias
):
    float64_norm(LlamaRMSNorm)
    biases = (f"mixer.bias={bias}", f"channel.bias={bias}")
    model = shuffle_norms(build_model(*SMALL, tied, *biases))
    llama = to_llama(model)
    # angles are float32 in both, from frequencies that are float64 here and float32 there
    close = {"atol": 2e-6, "rtol": 2e-6}
    same_function(model, llama, dense_weights, **close)
    tokens = random_tokens()
    targets, weights = tokens.roll(-1, dims=1), torch.ones(tokens.shape)
    weights[:, -1] = 0
    ours = Causal()(model, tokens, targets, weights, SequenceContext.dense(*tokens.shape))
    loss = (ours.loss_sum / ours.weight_sum).float()
    torch.testing.assert_close(loss, llama(tokens, labels=tokens).loss, **close)


@pytest.mark.parametrize("tied", TIED)
def test_greedy_generation_token_for_token(build_model, shuffle_norms, same_greedy_text, tied):
    model = shuffle_norms(build_model(*SMALL, tied))
    same_greedy_text(model, to_llama(model))


def test_float32_and_saved_files(build_model, shuffle_norms, random_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = shuffle_norms(build_model(*SMALL, TIED[0], dtype=torch.float32))
    to_llama(model).save_pretrained(tmp_path)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens()
    logits = model.logits(model(tokens, SequenceContext.dense(*tokens.shape)).hidden_BTD)
    torch.testing.assert_close(logits, llama(tokens).logits, atol=2e-5, rtol=1e-4)


def test_published_8b(build_model):
    """The sizes of the preset are those under which transformers counts the published number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = build_model(model="llama3_8b", vocab_size=128256, device="meta", dtype=torch.float32)
    published = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    ours = llama_config(model)
    assert ours.to_dict() == published.to_dict()
    with torch.device("meta"):
        assert LlamaForCausalLM(published).num_parameters() == 8_030_261_248
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_published_70b(build_model):
    """arXiv:2407.21783, table 3; the released configuration has these sizes."""
    from transformers import LlamaConfig

    model = build_model(model="llama3_70b", vocab_size=128256, device="meta", dtype=torch.float32)
    published = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    assert llama_config(model).to_dict() == published.to_dict()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            [],
            {"position": "learned"},
            r"position: got Learned, which Llama does not have, expected",
        ),
        (
            ["position.interleaved=true"],
            {},
            r"position: got Rope, .*expected rope, not interleaved",
        ),
        (
            ["position.scaling=linear", "position.factor=2.0"],
            {},
            r"position: got scaled frequencies, .* expected position.scaling=none",
        ),
        (["position.fraction=0.6"], {}, r"position: got a partly rotated head, .*fraction=1.0"),
        (["embedding.scale=2.0"], {}, r"embedding: got scale=2.0, .*expected embedding.scale=null"),
        (["stack.norm_position=post"], {}, r"stack: got norm_position=post, .*expected norm_pos"),
        (["stack.shared=a"], {}, r"stack: got blocks applied more than once, .*shared=null"),
        (
            ["stack.norm_position=pre"],
            {"stack": "recurrent_depth"},
            r"stack: got blocks applied more than once, .*expected stack=decoder",
        ),
        (["mixer.window=8"], {}, r"layer 0, mixer: got window=8, .*expected mixer.window=null"),
        (["mixer.qk_norm=true"], {}, r"layer 0, mixer: got qk_norm=true, .*mixer.qk_norm=false"),
        (["mixer.softmax_scale=1.0"], {}, r"layer 0, mixer: got softmax_scale=1.0, "),
        ([], {"channel": "gelu"}, r"layer 0, channel: got Gelu, .*expected swiglu; train with"),
        ([], {"norm": "layernorm"}, r"norm1: got LayerNorm, which Llama does not have, .*rmsnorm"),
        (
            ["mixers.b.n_kv_heads=3", "stack.pattern=[a,b,a]"],
            {"mixers": {"b": "attention"}},
            r"stack: got layers of different shapes, .*expected one shape for all layers",
        ),
    ],
)
def test_parts_without_counterpart(build_model, changes, options, message):
    model = build_model(*SMALL, *changes, **options)
    with pytest.raises(ValueError, match=f"export to Llama: .*{message}"):
        to_llama(model)


def test_mixers_of_other_kinds_have_no_counterpart(make_model, build_model):
    model, other = build_model(*SMALL), make_model()
    model.stack.blocks[1].mixer = other.stack.blocks[0].mixer
    with pytest.raises(ValueError, match=r"layer 1, mixer: got Leaky, .*expected attention; train"):
        to_llama(model)


def test_a_weight_that_is_left_out_is_noticed(build_model):
    """A tied head is no parameter of its own; nothing else may be missing, or be too much."""
    model = build_model(*SMALL, TIED[0])
    weights, config = dense_weights(model), llama_config(model)
    assert config.tie_word_embeddings
    for wrong in (
        {name: value for name, value in weights.items() if name != "model.norm.weight"},
        {**weights, "model.norm.bias": weights["model.norm.weight"]},
    ):
        with pytest.raises(AssertionError, match=r"model\.norm"):
            transformers_model(LlamaForCausalLM, config, wrong, model)
