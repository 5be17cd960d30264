"""Small models with their tokenizers, and lm-eval's requests without a task."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from llmtrain_data.tokenizer import Bpe, load_tokenizer, train_bpe, vocab_span
from llmtrain_eval.adapter import LlmtrainLM
from lm_eval.api.instance import Instance

VOCABULARY = """the model reads a row of tokens and predicts every next one while documents stay
apart def return import self value number 12345 67890 pass key text line green blue yellow"""
WORDS = VOCABULARY.split()


def make_text(lines: int, seed: int = 0) -> str:
    """Lines of random words; indentation, punctuation and non-ASCII characters included."""
    generator = torch.Generator().manual_seed(seed)
    marks = (".", ",", ":", " -", " é", "")
    out = []
    for _ in range(lines):
        n, indent, mark = (int(torch.randint(k, (1,), generator=generator)) for k in (9, 3, 6))
        picks = torch.randint(len(WORDS), (n + 2,), generator=generator).tolist()
        out.append("  " * indent + " ".join(WORDS[i] for i in picks) + marks[mark])
    return "\n".join(out) + "\n"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE of 400 tokens, end-of-text is 0."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_bpe([make_text(400)], Bpe(vocab_size=400)).to_str())
    return path


@pytest.fixture
def tokenizer(tokenizer_file):
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def small_model(build_model, tokenizer):
    """small_model(): two layers over the tokenizer, decided enough for greedy decoding."""

    def make(*changes, dtype=torch.float32, **options):
        sizes = (
            "model.d_model=32",
            "model.n_layers=2",
            "model.n_heads=4",
            "model.n_kv_heads=2",
            "model.ffn_hidden=48",
            "model.init_std=0.2",
            "model.max_seq_len=256",
        )
        vocab_size = vocab_span(tokenizer)
        model = build_model(*sizes, *changes, vocab_size=vocab_size, dtype=dtype, **options)
        return model.eval()

    return make


@pytest.fixture
def make_lm(small_model, tokenizer):
    """make_lm(model=None, max_length=64, ...): the adapter around a small model."""

    def make(model=None, **options):
        options = {"eot_token_id": 0, "max_length": 64, "batch_tokens": 200, **options}
        return LlmtrainLM(model or small_model(), tokenizer, **options)

    return make


def requests(kind, arguments, task="test"):
    """lm-eval requests of one kind, one for each tuple of arguments."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, i, 1))
        for i, args in enumerate(arguments)
    ]


@pytest.fixture
def ask():
    return requests
