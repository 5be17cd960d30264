"""Small models with their tokenizers, and lm-eval's requests without a task."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from llmtrain_data.manifest import Manifest
from llmtrain_data.prepare import prepare
from llmtrain_data.sources import LocalFiles
from llmtrain_data.tokenizer import Bpe, Existing, load_tokenizer, train_bpe, vocab_span
from llmtrain_eval.adapter import LlmtrainLM
from lm_eval.api.instance import Instance

from llmtrain import build
from llmtrain.config import compose
from llmtrain.distributed import World
from llmtrain.train.checkpoint import CheckpointWriter
from llmtrain.train.partitions import Fragment

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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, tokenizer_file):
    """A prepared corpus of two sources, each with a val split."""
    folder = tmp_path_factory.mktemp("corpus")
    for source, count in (("one", 40), ("two", 20)):
        (folder / source).mkdir()
        for number in range(count):
            text = make_text(12 + number, seed=1000 * len(source) + count + number)
            (folder / source / f"{number:02d}.txt").write_text(text)
    prepare(
        out_dir=folder / "data" / "small",
        sources={name: LocalFiles(str(folder / name)) for name in ("one", "two")},
        tokenizer=Existing(path=str(tokenizer_file)),
        val_fraction=0.3,
        workers=1,
    )
    return folder / "data" / "small"


# A model of milliseconds, trained on rows of 64 tokens.
TINY = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.ffn_hidden=48",
    "model.init_std=0.2",
    "model.max_seq_len=256",
    "train.seq_len=64",
    "train.global_batch_tokens=256",
    "tracker=none",
)


def write_checkpoint(run_dir, corpus, *changes, step=7):
    """A run folder with one checkpoint of an untrained model that "read" 4 rows a step."""
    data = ("data.root=" + str(corpus.parent), "data.name=" + corpus.name)
    sources = ("data=text", "data.sources.text.root=unused")
    config = compose("train", [*TINY, *sources, *data, f"run_dir={run_dir}", *changes])
    manifest = Manifest.load(corpus)
    model = build.build_model(config, vocab_size=manifest.vocab_size)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    writer = CheckpointWriter(
        run_dir,
        World(rank=0, size=1, local_rank=0),
        config=config,
        keep=3,
        vocab_size=manifest.vocab_size,
        parameters={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        corpus_files={name: corpus / name for name in ("tokenizer.json", "token_bytes.npy")},
    )
    fragments = [
        Fragment(name=name, offset=0, views={"param": tensor.reshape(-1)})
        for name, tensor in tensors.items()
    ]
    trainer = {"step": step, "next_sample": 4 * step, "data_fingerprint": manifest.fingerprint}
    writer.save(step, fragments, {}, trainer)
    return run_dir


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, corpus):
    return write_checkpoint(tmp_path_factory.mktemp("runs") / "small", corpus)


@pytest.fixture
def make_run(tmp_path, corpus):
    """make_run("position=learned"): another run folder with a checkpoint."""
    return lambda *changes: write_checkpoint(tmp_path / "run", corpus, *changes)


@pytest.fixture
def eval_config(tmp_path):
    """eval_config(run_dir, "tasks=[next_line]"): a composed eval.yaml, results in tmp_path/out."""

    def make(run_dir, *changes):
        fixed = ("device=cpu", f"out={tmp_path / 'out'}", f"checkpoint={run_dir}")
        return compose("eval", [*fixed, *changes])

    return make


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
