"""Types of the plain sections of a configuration, and the check of a value against a type.

Parts (nodes with a `_target_`) are checked against their constructor's annotations instead.
Defaults live in the YAML files only.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Train:
    seq_len: int
    global_batch_tokens: int
    micro_batch: int | None
    total_tokens: int
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    compile: Literal["none", "blocks", "model"]
    cuda_graphs: Literal["auto", "always", "never"]
    activation_checkpointing: Literal["none", "full"]
    grad_clip: float | None
    device: Device
    mask_documents: bool
    log_every: int
    val_every: int
    val_tokens: int
    save_every: int
    async_save: bool
    save_failures: int
    keep: int
    keep_every: int | None
    resume: str
    profile: bool
    profile_first: int
    profile_steps: int
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class Guard:
    window: int
    warmup_steps: int
    loss_spike: float | None
    norm_spike: float | None
    max_skipped: int
    rollback_after: int | None
    rollback_window: int
    max_rollbacks: int
    inject: list[str]


@dataclass(frozen=True, kw_only=True)
class Health:
    hang_seconds: float | None
    first_step_seconds: float
    compare_every: int | None
    straggler_factor: float | None
    optimizer_check: bool
    optimizer_check_elements: int


@dataclass(frozen=True, kw_only=True)
class Model:
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int | None
    ffn_hidden: int
    vocab_size: int | None
    vocab_multiple: int
    tie_embeddings: bool
    norm_eps: float
    qk_norm: bool
    rope_theta: float
    max_seq_len: int
    init_std: float
    mup_base_width: int | None
    mup_base_head_dim: int | None


@dataclass(frozen=True, kw_only=True)
class Data:
    name: str
    root: str
    sources: dict[str, dict]
    val_sources: dict[str, dict]
    val_fraction: float
    weights: dict[str, float] | None
    shard_tokens: int
    workers: int | None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str
    run_dir: str
    seed: int
    train: Train
    guard: Guard
    health: Health
    mixers: dict[str, dict]
    channels: dict[str, dict]
    dry_run: bool
    model: Model
    data: Data
    tokenizer: dict
    embedding: dict
    position: dict
    mixer: dict
    channel: dict
    norm: dict
    stack: dict
    objective: dict
    optimizer: dict
    schedule: dict
    deepspeed: dict
    tracker: dict


@dataclass(frozen=True, kw_only=True)
class PrepConfig(TrainConfig):
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    ranks: int
    tokens_per_second: float | None
    device_name: str | None
    mfu: float


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    stride: int | None
    max_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class NextLine:
    items: int
    context_lines: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Passkey:
    lengths: list[int]
    depths: list[float]
    samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    checkpoint: str
    tasks: list[str]
    include_path: str | None
    limit: int | None
    num_fewshot: int | None
    max_length: int | None
    add_bos: bool
    log_samples: bool
    corpus: str | None
    batch_tokens: int
    repeats: int | None
    device: Device
    precision: Precision
    out: str | None
    seed: int
    bits_per_byte: BitsPerByte
    next_line: NextLine
    passkey: Passkey


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    checkpoint: str
    prompt: str | list[str]
    max_new_tokens: int
    samples: int
    temperature: float
    top_k: int | None
    top_p: float | None
    speculate: int | None
    repeats: int | None
    exit_threshold: float | None
    seed: int
    device: Device
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Preflight:
    enabled: bool
    timeout_seconds: int
    gemm_share: float | None
    all_reduce_share: float | None
    clock_seconds: float
    disk_gib: float
    disk_mib_per_second: float


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    nodes: int
    min_nodes: int | None
    gpus: int
    tasks_per_node: int | None
    gpu_request: Literal["gpus-per-node", "gres"]
    partition: str | None
    account: str | None
    qos: str | None
    time: int | str | None
    cpus_per_task: int | None
    mem: int | str | None
    constraint: str | None
    exclude: list[str]
    signal_seconds: int
    max_restarts: int
    setup: list[str]
    sbatch: list[str]
    srun: list[str]
    python: str | None
    chain: list[Literal["prep", "train", "eval"]]
    array_limit: int | None
    dry_run: bool
    preflight: Preflight


@dataclass(frozen=True, kw_only=True)
class PreflightConfig(LaunchConfig):
    run_dir: str
    out: str | None


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    run_dir: str | None
    root: str


@dataclass(frozen=True, kw_only=True)
class LogsConfig:
    run_dir: str
    rank: int | list[int] | None
    since: str | None
    step: int | None
    tail: int | None
    follow: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    action: Literal["list", "verify", "consolidate"]
    run_dir: str | None
    checkpoint: str | None
    out: str | None
    dtype: Precision


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    action: Literal["step", "data", "kernels"]
    quick: bool
    only: list[str]
    budget: float
    out: str
    device: Device
    contenders: list[str]
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    compile: Literal["none", "blocks", "model"]
    changes: list[str]
    intervals: int
    limit: float
    peers: bool


COMMANDS = {
    "prep": PrepConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "plan": PlanConfig,
    "launch": LaunchConfig,
    "preflight": PreflightConfig,
    "status": StatusConfig,
    "logs": LogsConfig,
    "checkpoint": CheckpointConfig,
    "bench": BenchConfig,
}


WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def describe(annotation: object) -> str:
    """A type in the user's words: "int or null", "one of fp32, bf16"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin is Literal:
        return f"one of {', '.join(str(value) for value in arguments)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        return f"a list ({describe(arguments[0])} each)"
    if origin is dict or annotation is dict:
        return "a dict"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def fits(value: object, annotation: object) -> bool:
    """Whether a YAML value is of a type; an int is a float, a bool is no int."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, argument) for argument in arguments)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is Path:
        return isinstance(value, str)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def check_type(value: object, annotation: object, place: str) -> None:
    """ValueError when the value is not of the type."""
    if not fits(value, annotation):
        kind = "null" if value is None else f"{value!r} ({type(value).__name__})"
        how = f"{place}=..."
        if fits(str(value), annotation):
            how = f"""'{place}="{value}"'"""
        elif isinstance(value, float) and value.is_integer():
            how = f"{place}={int(value)}"
        raise ValueError(f"{place}: got {kind}, expected {describe(annotation)}; write {how}")
