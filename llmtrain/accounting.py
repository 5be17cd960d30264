"""What a model costs: parameters, FLOPs, bytes of state, memory of a training rank, and MFU.

FLOPs: a multiply-add is 2; matrix products only (norms and activations are below a percent). The
backward pass is twice the forward pass; recomputation by activation checkpointing is not counted.

    MFU = train FLOPs per token * tokens per second / (devices * dense bf16 peak of the device)

so that every mixer and every precision is measured against the same number. A device that is not
in the table (any CPU too) has no MFU: a measured matmul rate would not be comparable.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from llmtrain_kernels.linear_cross_entropy.chunks import logits_limit, most_rows, row_stride

from llmtrain.channels.base import Channel
from llmtrain.mixers.base import Mixer
from llmtrain.model.language_model import LanguageModel
from llmtrain.model.linear import Linear

PARTS = ("embedding", "position", "mixer", "channel", "norm", "head", "stack", "mtp")
FP32_BYTES = 4

# Dense bf16 tensor-core peak in FLOP/s with float32 accumulation, from NVIDIA's data sheets and
# architecture white papers (their figures with sparsity are twice these). First match wins.
PEAK_BF16 = (
    (r"GB[23]00", 2500e12),
    (r"B[23]00", 2250e12),
    (r"H[12]00 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H200|H800|GH200", 989e12),
    (r"H20", 148e12),
    (r"A100|A800", 312e12),
    (r"A40", 149.7e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
)


def parameters_by_part(model: LanguageModel) -> dict[str, int]:
    """Number of parameters of each part, in the order of PARTS, then "total". Works on meta."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return {**counts, "total": counts.total()}


def active_parameters(model: LanguageModel) -> int:
    """Parameters that a token uses: all but those of the experts that it does not take."""
    idle = sum(m.idle_parameters() for m in model.modules() if isinstance(m, Channel))
    return sum(p.numel() for p in model.parameters()) - idle


def part_of(name: str) -> str:
    """The part that a parameter belongs to: "stack.blocks.3.norm1.weight" -> "norm". "stack": what
    joins the blocks, such as the adapter of recurrent depth."""
    top, *rest = name.split(".")
    if top != "stack":
        return top
    part = rest[2] if rest[0] == "blocks" else rest[0]
    part = re.sub(r"[12](_out)?$", "", part)
    return part if part in PARTS else "stack"


def flops_per_token(model: LanguageModel, tokens: int) -> float:
    """Forward FLOPs per token in rows of that many tokens, padding rows of the head included, the
    modules of multi-token prediction not."""
    return model.flops_per_token(tokens)


def train_flops_per_token(model: LanguageModel, tokens: int) -> float:
    """Forward and backward FLOPs per token in rows of that many tokens, with multi-token
    prediction. Iterations of a recurrent depth that are not differentiated have no backward pass;
    their number is the mean over the training."""
    rest = flops_per_token(model, tokens) - model.stack.flops_per_token(tokens)
    rest += model.mtp_flops_per_token(tokens)
    return 3.0 * rest + model.stack.train_flops_per_token(tokens)


def state_bytes(model: LanguageModel, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that generation keeps for one row of that many tokens."""
    return model.stack.state_bytes(tokens, dtype)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device as torch.cuda.get_device_name() calls it, None if unknown."""
    for pattern, peak in PEAK_BF16:
        if re.search(rf"\b({pattern})\b", device_name):
            return peak
    return None


def mfu(
    tokens_per_second: float, train_flops_per_token: float, device_name: str, devices: int = 1
) -> float | None:
    """Model FLOP utilisation between 0 and 1, None for a device of unknown peak."""
    peak = peak_flops(device_name)
    if peak is None:
        return None
    return tokens_per_second * train_flops_per_token / (devices * peak)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank at the fullest moment of a training step.

    parameters: what the forward pass reads; master: the copy that the optimizer steps;
    buffers: communication; activations: kept for the backward pass, with the weights in compute
    dtype; logits: head and loss; step: temporary in the optimizer step, when activations are gone.
    """

    parameters: int
    master: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    step: int

    @property
    def total(self) -> int:
        backward, step = self.activations + self.logits, self.step
        return sum(asdict(self).values()) - min(backward, step)


def memory_per_rank(
    model: LanguageModel,
    *,
    stage: int,
    world_size: int,
    micro_batch: int,
    seq_len: int,
    optimizer_values: int | None = None,
    optimizer_step_values: int = 0,
    activation_checkpointing: str = "none",
    compiled: bool = False,
    chunk_tokens: int | None = None,
    fused_head: bool = False,
    bucket_elements: int = 0,
    live_parameters: int = 1_000_000_000,
) -> MemoryEstimate:
    """Estimate for float32 parameters, gradients and state under DeepSpeed (read in 0.19.8).

    N parameters, W ranks; stages 1 and 2 of one rank are stage 0 (train/zero.py). Stage 3 steps a
    float32 copy of the rank's N/W parameters, though the parameters are float32 already (it means
    not to, but compares a torch.device with a string); stages 1 and 2 step them where they are
    (train/partitions.py). All three gather the gradients into a second flat buffer for the step.
    Stage 1 keeps whole gradients until then, 2 and 3 only those of the rank; 3 splits the
    parameters too, and gathers at most live_parameters of them (stage3_max_live_parameters).

    optimizer_values: float32 values that the optimizer keeps of the whole model, None for AdamW's
    two a parameter; optimizer_step_values: temporary ones while it steps.
    bucket_elements: communication buffers altogether (reduce_bucket_size, twice with overlap_comm);
    they never hold more than all gradients, and one rank has none.
    chunk_tokens: the objective's; fused_head: whether it keeps no logits. Works on meta.
    """
    if stage not in range(4):
        raise ValueError(f"memory: got ZeRO stage {stage}, expected 0, 1, 2 or 3; set deepspeed")
    stage = 0 if world_size == 1 and stage in (1, 2) else stage
    count = sum(p.numel() for p in model.parameters())
    whole, shard = FP32_BYTES * count, FP32_BYTES * -(-count // world_size)
    kept = 2 * count if optimizer_values is None else optimizer_values
    owners = world_size if stage > 0 else 1
    gathered = FP32_BYTES * min(count, live_parameters)
    tokens = micro_batch * seq_len
    return MemoryEstimate(
        parameters=whole if stage < 3 else shard + gathered,
        master=shard if stage == 3 else 0,
        gradients=whole if stage < 2 else shard,
        optimizer=FP32_BYTES * -(-kept // owners),
        buffers=FP32_BYTES * min(bucket_elements, count) if world_size > 1 else 0,
        activations=activation_bytes(model, tokens, activation_checkpointing, compiled=compiled),
        logits=fused_head_bytes(model, tokens, chunk_tokens=chunk_tokens)
        if fused_head
        else logits_bytes(model, tokens, compiled=compiled, chunk_tokens=chunk_tokens),
        step=(shard if stage > 0 else 0) + FP32_BYTES * -(-optimizer_step_values // owners),
    )


def activation_bytes(
    model: LanguageModel, tokens: int, activation_checkpointing: str, *, compiled: bool = False
) -> int:
    """Bytes kept for the backward pass of that many tokens, without head and loss.

    Inputs and outputs of every linear layer and expert are counted, which stands for what lies
    between them too (queries, gates, norms); what recurrent mixers keep besides, and in half
    precision the weights' copies in that dtype, which stay between the passes (train/copies.py).
    """
    size = model.compute_dtype.itemsize
    per_application = []
    copied: dict[Linear, int] = {}
    for block in [*model.stack.differentiated, *(model.mtp or ())]:
        linears = [m for m in block.modules() if isinstance(m, Linear)]
        kept = [m.kept_values() for m in block.modules() if isinstance(m, Channel)]
        values = sum(m.in_features + m.out_features for m in linears) + sum(v for v, _ in kept)
        copies = sum(w for _, w in kept) if size < FP32_BYTES else 0
        if size < FP32_BYTES:
            copied |= {m: size * m.weight.numel() for m in linears}
        mixers = [m for m in block.modules() if isinstance(m, Mixer)]
        mixed = sum(m.kept_bytes(model.compute_dtype, compiled=compiled) for m in mixers)
        per_application.append(size * (values * tokens + copies) + math.ceil(mixed * tokens))
    if activation_checkpointing == "none":
        return sum(per_application) + sum(copied.values())
    inputs = size * tokens * model.embedding.weight.shape[1] * len(per_application)
    return inputs + max(per_application) + sum(copied.values())


def logits_bytes(
    model: LanguageModel, tokens: int, *, compiled: bool, chunk_tokens: int | None
) -> int:
    """Logits and their gradient in compute dtype; eager, also three float32 copies in the loss.

    Every module of multi-token prediction has logits of its own; in chunks one head's are alive.
    """
    size = model.compute_dtype.itemsize
    heads = 1 if model.mtp is None else 1 + len(model.mtp)
    rows = heads * tokens if chunk_tokens is None else min(tokens, chunk_tokens)
    return rows * model.padded_vocab_size * (2 * size + (0 if compiled else 3 * FP32_BYTES))


def fused_head_bytes(model: LanguageModel, tokens: int, *, chunk_tokens: int | None) -> int:
    """What takes the logits' place when the head makes its gradients in the forward pass: a chunk
    of logits, the weight in compute dtype, and of every head the gradients."""
    size = model.compute_dtype.itemsize
    columns, width = model.head_weight.shape
    limit = logits_limit(columns, width, FP32_BYTES)
    rows = chunk_tokens or most_rows(columns, size, limit)
    buffer = min(rows, tokens) * row_stride(columns) * size
    copy = columns * width * size if size < FP32_BYTES else 0
    heads = 1 if model.mtp is None else 1 + len(model.mtp)
    return buffer + copy + heads * (FP32_BYTES * columns * width + size * tokens * width)
