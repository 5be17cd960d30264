"""What `llmtrain bench step` measures: models, lengths and batches, and who trains them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from llmtrain import accounting, build
from llmtrain.config import compose


@dataclass(frozen=True, kw_only=True)
class Entry:
    """name: for the tables; model: option of the group; changes: further overrides of the model.
    seq_len, micro_batch (rows), micro_steps: of a step; vocab: tokens of the vocabulary.
    layers_of: the entry with fewer layers that the cost of a layer is told from."""

    name: str
    model: str
    seq_len: int
    micro_batch: int
    micro_steps: int
    vocab: int
    changes: tuple[str, ...] = ()
    layers_of: str | None = None

    @property
    def step_tokens(self) -> int:
        return self.seq_len * self.micro_batch * self.micro_steps

    def overrides(self, *, precision: str, compile_mode: str) -> list[str]:
        """Of `llmtrain train`: the model and its rows. Documents are not masked, since the peers
        know none."""
        return [
            f"model={self.model}",
            f"tokenizer.vocab_size={self.vocab}",
            f"model.max_seq_len={self.seq_len}",
            f"train.seq_len={self.seq_len}",
            f"train.micro_batch={self.micro_batch}",
            f"train.global_batch_tokens={self.step_tokens}",
            f"train.precision={precision}",
            f"train.compile={compile_mode}",
            "train.mask_documents=false",
            *self.changes,
        ]

    def facts(self, config: dict) -> dict:
        """Sizes for the peers, parameters and FLOPs. config: composed from the overrides."""
        model = build.build_model(config, vocab_size=self.vocab, device="meta")
        return {
            **asdict(self),
            "sizes": config["model"],
            "params": accounting.parameters_by_part(model)["total"],
            "flops_per_token": accounting.train_flops_per_token(model, self.seq_len),
        }

    def config(self, **options: str) -> dict:
        return compose("train", [*self.overrides(**options), f"train.total_tokens={10**15}"])


LLAMA_1B = Entry(
    name="1.26b", model="llama_1b", seq_len=4096, micro_batch=8, micro_steps=2, vocab=32000
)
SLICE = Entry(
    name="8b_2layers",
    model="llama3_8b",
    seq_len=4096,
    micro_batch=2,
    micro_steps=2,
    vocab=128256,
    changes=("model.n_layers=2",),
)
GPT = Entry(name="124m", model="gpt_124m", seq_len=1024, micro_batch=32, micro_steps=2, vocab=32768)
# In the order of what a short budget should reach.
ENTRIES = (
    LLAMA_1B,
    GPT,
    replace(GPT, name="350m", model="gpt_350m", micro_batch=16, micro_steps=4),
    SLICE,
    replace(SLICE, name="8b_4layers", changes=("model.n_layers=4",), layers_of="8b_2layers"),
    replace(LLAMA_1B, name="1.26b_4rows", micro_batch=4, micro_steps=4),
    replace(LLAMA_1B, name="1.26b_8k", seq_len=8192, micro_batch=4),
    replace(LLAMA_1B, name="1.26b_32k", seq_len=32768, micro_batch=1),
    replace(LLAMA_1B, name="1.26b_262k", micro_steps=8),
)
TINY = Entry(
    name="tiny_1layer",
    model="tiny",
    seq_len=32,
    micro_batch=2,
    micro_steps=2,
    vocab=512,
    changes=("model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.n_layers=1"),
)
QUICK = (
    TINY,
    replace(
        TINY,
        name="tiny_3layers",
        changes=(*TINY.changes[:-1], "model.n_layers=3"),
        layers_of="tiny_1layer",
    ),
)
