"""One contender of `llmtrain bench step`, in a process of its own, making the same steps.

    python -m llmtrain.bench.contender SPEC.json      prints one JSON line an event

    bare         our model in a plain loop: fused AdamW on float32 weights, clipping, no DeepSpeed
    hf_liger     Hugging Face's Llama with liger's kernels
    hf_compile   Hugging Face's Llama under torch.compile
    torchtitan   its Llama 3, each block under torch.compile

Peers hold bf16 weights and no float32 ones, which is less work than ours do; those with _fp32 hold
float32 weights and compute in bf16 under autocast. They do not clip. All see random tokens, equally
many a step and in equal micro-batches, and every step ends with fused AdamW.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Peer -> the package that it needs.
NEEDS = {
    "hf_liger": "liger_kernel",
    "hf_compile": "transformers",
    "torchtitan": "torchtitan",
    "hf_liger_fp32": "liger_kernel",
    "hf_compile_fp32": "transformers",
}
CONTENDERS = ("ours", "bare", *NEEDS)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model to be trained. loss: (tokens_BT, targets_BT) -> mean loss; clip: of the norm."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    clip: float | None = None


def absent(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    package = NEEDS.get(name)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"absent: {package} is not installed"


def bare(spec: dict, device: torch.device) -> Trainee:
    """Our model as the trainer makes it, without the engine."""
    from llmtrain import build
    from llmtrain.context import SequenceContext
    from llmtrain.train.copies import use_float8
    from llmtrain.train.module import TrainModule

    config, knobs = spec["config"], spec["config"]["train"]
    dtype = build.DTYPES[knobs["precision"]]
    model = build.build_model(config, vocab_size=spec["vocab"], compute_dtype=dtype, device=device)
    if knobs["precision"] in build.SCALINGS:
        use_float8(model, build.SCALINGS[knobs["precision"]])
    module = TrainModule(model, build.build_objective(config), torch.ones(spec["vocab"]))
    module.to(device)
    if knobs["compile"] == "model":
        module.compile_model()
    elif knobs["compile"] == "blocks":
        module.compile_blocks()
    ctx = SequenceContext.dense(spec["micro_batch"], spec["seq_len"]).to(device)
    weights_BT = torch.ones(spec["micro_batch"], spec["seq_len"], device=device)

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return module.compute(tokens_BT, targets_BT, weights_BT, ctx)[0] / targets_BT.numel()

    return Trainee(module=module, loss=loss, clip=knobs["grad_clip"])


def hf_llama(spec: dict, device: torch.device, *, liger: bool, masters: bool) -> Trainee:
    """Llama of the same sizes as Hugging Face writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    sizes = spec["sizes"]
    config = LlamaConfig(
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["ffn_hidden"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        vocab_size=spec["vocab"],
        max_position_embeddings=spec["seq_len"],
        tie_word_embeddings=sizes["tie_embeddings"],
        rms_norm_eps=sizes["norm_eps"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    dtype = torch.float32 if masters else torch.bfloat16
    with torch.device(device):
        module = LlamaForCausalLM(config).to(dtype)
    backend = "aot_eager" if spec["quick"] else "inductor"
    call = module if liger else torch.compile(module, backend=backend, dynamic=False)
    autocast = torch.autocast(device.type, torch.bfloat16) if masters else contextlib.nullcontext()

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with autocast:  # it shifts the labels by itself
            return call(input_ids=tokens_BT, labels=tokens_BT).loss

    return Trainee(module=module, loss=loss)


def torchtitan(spec: dict, device: torch.device) -> Trainee:
    """torchtitan's Llama 3 (0.3), built from what its own list of sizes is built from. Dense rows:
    its attention for packed documents is exchanged for its plain causal one."""
    from torchtitan.models import llama3 as titan
    from torchtitan.models.common.attention import ScaledDotProductAttention

    sizes, head_dim = spec["sizes"], spec["sizes"]["d_model"] // spec["sizes"]["n_heads"]
    d_model, vocab = sizes["d_model"], spec["vocab"]
    layers = titan._build_llama3_layers(
        n_layers=sizes["n_layers"],
        dim=d_model,
        n_heads=sizes["n_heads"],
        n_kv_heads=sizes["n_kv_heads"],
        hidden_dim=sizes["ffn_hidden"],
        rope=titan.ComplexRoPE.Config(
            dim=head_dim, max_seq_len=spec["seq_len"], theta=sizes["rope_theta"]
        ),
        attn_backend="varlen",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    tied = sizes["tie_embeddings"]
    first = titan._EMBEDDING_SKIP_INIT if tied else titan._EMBEDDING_INIT
    config = titan.Llama3Model.Config(
        dim=d_model,
        vocab_size=vocab,
        tok_embeddings=titan.Embedding.Config(
            num_embeddings=vocab, embedding_dim=d_model, param_init=first
        ),
        norm=titan.RMSNorm.Config(normalized_shape=d_model, param_init=titan._NORM_INIT),
        lm_head=titan.Linear.Config(
            in_features=d_model, out_features=vocab, param_init=titan._output_linear_init(d_model)
        ),
        layers=layers,
        enable_weight_tying=tied,
    )
    with torch.device("meta"):
        module = config.build()
    module.to_empty(device=device)
    module.init_states(buffer_device=device)
    module.to(torch.bfloat16)
    for layer in module.layers.values():
        layer.compile(backend="aot_eager" if spec["quick"] else "inductor", dynamic=False)
    positions_BT = torch.arange(spec["seq_len"], device=device).expand(spec["micro_batch"], -1)

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTO = module(tokens_BT, positions=positions_BT)
        return nn.functional.cross_entropy(logits_BTO.flatten(0, 1).float(), targets_BT.flatten())

    return Trainee(module=module, loss=loss)


def make(spec: dict, device: torch.device) -> Trainee:
    name = spec["contender"]
    if name == "bare":
        return bare(spec, device)
    if name == "torchtitan":
        return torchtitan(spec, device)
    masters = name.endswith("_fp32")
    return hf_llama(spec, device, liger=name.startswith("hf_liger"), masters=masters)


def step_of(trainee: Trainee, spec: dict, device: torch.device) -> Callable[[], None]:
    """A whole optimizer step."""
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(0)
    shape = (spec["micro_batch"], spec["seq_len"] + 1)
    rows = [
        torch.randint(spec["vocab"], shape, generator=draw).to(device)
        for _ in range(spec["micro_steps"])
    ]
    micros = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]

    def step() -> None:
        for tokens_BT, targets_BT in micros:
            (trainee.loss(tokens_BT, targets_BT) / len(micros)).backward()
        if trainee.clip is not None:
            nn.utils.clip_grad_norm_(trainee.module.parameters(), trainee.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    trainee = make(spec, device)
    step = step_of(trainee, spec, device)

    def stretch(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    stretch(1)
    print(json.dumps({"first": True}), flush=True)
    stretch(spec["steps"] - 1)
    seconds = [stretch(spec["steps"]) for _ in range(spec["intervals"])]
    from llmtrain.train.meter import peak_memory

    params = sum(p.numel() for p in trainee.module.parameters())
    masters = all(p.dtype == torch.float32 for p in trainee.module.parameters())
    found = {"step_seconds": seconds, "params": params, "fp32_masters": masters}
    print(json.dumps({**found, "peak_gib": peak_memory(device) / 2**30}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
