"""What a run will cost, computed from a model on the meta device: nothing is allocated.

The estimate of memory is explained in accounting.py. Hours need a rate: a measured one, or the
device's bf16 peak times an assumed MFU.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from llmtrain import accounting, build
from llmtrain.accounting import MemoryEstimate

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """parameters: part -> count, with "total"; active_parameters: those that a token uses. flops:
    forward, per token; train_flops: per training token, forward and backward at twice that,
    multi-token prediction included. state_bytes: length in tokens -> bytes a generated row keeps,
    in bf16. memory: ZeRO stage -> estimate for one rank. hours: None without a rate."""

    parameters: dict[str, int]
    active_parameters: int
    flops: float
    train_flops: float
    state_bytes: dict[int, int]
    memory: dict[int, MemoryEstimate]
    stage: int | None
    ranks: int
    micro_batch: int
    row_bytes: int
    seq_len: int
    rows: int
    steps: int
    tokens: int


def make_plan(config: dict, *, ranks: int = 1, device: str = "cuda") -> Plan:
    """The plan of a composed training configuration over that many ranks. device: their type.

    ValueError when the rows of a global batch do not divide among the ranks and micro-batches.
    """
    train = config["train"]
    model = build.build_model(
        config,
        vocab_size=build.configured_vocab_size(config),
        device="meta",
        compute_dtype=build.DTYPES[train["precision"]],
    )
    seq_len, micro_batch = train["seq_len"], train["micro_batch"] or 1
    rows = check_ranks(config, ranks)

    optimizer = build.part(config["optimizer"], build.label(config, "optimizer")).memory(model)

    backend = config["objective"].get("backend", "logits")
    fused_head = backend != "logits" and (backend != "auto" or device == "cuda")

    def memory(stage: int, micro_batch: int) -> MemoryEstimate:
        node = config["deepspeed"]
        return accounting.memory_per_rank(
            model,
            stage=0 if ranks == 1 and stage < 3 else stage,  # train/zero.py: for_ranks
            world_size=ranks,
            micro_batch=micro_batch,
            seq_len=seq_len,
            optimizer_values=optimizer.state,
            optimizer_step_values=optimizer.step,
            activation_checkpointing=train["activation_checkpointing"],
            compiled=train["compile"] != "none",
            chunk_tokens=config["objective"].get("chunk_tokens"),
            fused_head=fused_head,
            bucket_elements=node.get("reduce_bucket_size", 0) * (1 + node.get("overlap_comm", 0)),
        )

    one, two = memory(0, micro_batch), memory(0, micro_batch + 1)
    steps = math.ceil(train["total_tokens"] / train["global_batch_tokens"])
    lengths = sorted({seq_len, config["model"]["max_seq_len"]})
    return Plan(
        parameters=accounting.parameters_by_part(model),
        active_parameters=accounting.active_parameters(model),
        flops=accounting.flops_per_token(model, seq_len),
        train_flops=accounting.train_flops_per_token(model, seq_len),
        state_bytes={length: accounting.state_bytes(model, length) for length in lengths},
        memory={stage: memory(stage, micro_batch) for stage in STAGES},
        stage=getattr(build.target(config["deepspeed"], "deepspeed"), "stage", None),
        ranks=ranks,
        micro_batch=micro_batch,
        row_bytes=two.activations + two.logits - one.activations - one.logits,
        seq_len=seq_len,
        rows=rows,
        steps=steps,
        tokens=steps * train["global_batch_tokens"],
    )


def check_ranks(config: dict, ranks: int) -> int:
    """Rows of a global batch. ValueError when they do not divide among the ranks and
    micro-batches."""
    train = config["train"]
    rows = train["global_batch_tokens"] // train["seq_len"]
    micro_batch = train["micro_batch"] or 1
    if rows % (ranks * micro_batch):
        raise ValueError(
            f"train.global_batch_tokens: got {rows} rows of train.seq_len={train['seq_len']}, "
            f"expected a multiple of {ranks} ranks x {micro_batch} rows a micro-batch; change it, "
            "the number of ranks, or train.micro_batch"
        )
    return rows


def tokens_per_second(plan: Plan, wanted: dict) -> float | None:
    """The rate of all ranks together: the measured one, or peak * MFU of the named device.

    wanted: the plan section of the configuration.
    """
    if wanted["device_name"] is None:
        return wanted["tokens_per_second"]
    peak = accounting.peak_flops(wanted["device_name"])
    if peak is None:
        raise ValueError(
            f"plan.device_name: {wanted['device_name']!r} is not in the table of bf16 peaks "
            "(llmtrain/accounting.py), expected a name as torch.cuda.get_device_name() gives it; "
            "set plan.tokens_per_second instead"
        )
    return plan.ranks * peak * wanted["mfu"] / plan.train_flops


def describe(plan: Plan, rate: float | None = None) -> str:
    """The plan as text; rate: tokens per second of all ranks, for the hours."""
    total = plan.parameters["total"]
    passes = plan.train_flops / plan.flops
    if plan.parameters["mtp"]:
        how = "three times the forward pass, multi-token prediction included"
    elif abs(passes - 3) < 1e-6:
        how = "three times the forward pass"
    else:  # a recurrent depth
        how = f"{passes:.2f} times the forward pass: mean depth, its last iterations differentiated"
    names = [*(field.name for field in fields(MemoryEstimate)), "total"]
    lines, counts = ["parameters"], dict(plan.parameters)
    if plan.active_parameters < total:  # some experts are not a given token's
        counts["active"] = plan.active_parameters
    for name, count in counts.items():
        if count:
            lines.append(f"  {name:<12}{count:>16,}  {100 * count / total:5.1f} %")
    lines += [
        f"FLOPs per token, rows of {plan.seq_len} tokens",
        f"  forward     {plan.flops:>16.4g}",
        f"  training    {plan.train_flops:>16.4g}  ({how})",
        f"  whole run   {plan.train_flops * plan.tokens:>16.4g}",
        "state of one generated row (bfloat16)",
        *(f"  {length:>8} tokens {size:>13,} bytes" for length, size in plan.state_bytes.items()),
        f"memory of each of {plan.ranks} ranks, GiB, estimated; micro-batch of "
        f"{plan.micro_batch} rows (one more: +{gib(plan.row_bytes)})",
        "  ZeRO" + "".join(f"{name:>12}" for name in names),
    ]
    for stage, estimate in plan.memory.items():
        sizes = [*asdict(estimate).values(), estimate.total]
        mark = "*" if stage == plan.stage else " "
        lines.append(f"  {stage}{mark}  " + "".join(f"{gib(size):>12}" for size in sizes))
    lines += [
        f"run: {plan.steps:,} steps of {plan.rows} rows = {plan.tokens:,} tokens, "
        f"{plan.tokens / total:.1f} a parameter",
    ]
    if rate is not None:
        lines.append(f"hours: {plan.tokens / rate / 3600:.2f} at {rate:,.0f} tokens/s")
    return "\n".join(lines)


def gib(size: int) -> str:
    """Bytes as a number of GiB."""
    return f"{size / 2**30:.3f}"
