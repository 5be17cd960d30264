"""The ZeRO stages: what DeepSpeed is told, every key in words.

Nothing is left to a default, because defaults change meaning between versions (gradient_clipping
did in 2026-06). Rajbhandari et al. 2020, arXiv:1910.02054.

    stage 0: every rank holds weights, gradients and optimizer state (data parallel)
    stage 1: the optimizer state is divided among the ranks
    stage 2: the gradients too
    stage 3: the weights too; they are gathered layer by layer
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

COMMUNICATION_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Zero0:
    """Data parallel. communication_dtype: of the gradients while they are summed over ranks."""

    communication_dtype: str
    stage = 0
    averages = False  # over ranks; otherwise sums, which spares a pass over the gradients

    def __post_init__(self) -> None:
        if self.communication_dtype not in COMMUNICATION_DTYPES:
            raise ValueError(
                f"communication_dtype: got {self.communication_dtype!r}, expected one of "
                f"{', '.join(COMMUNICATION_DTYPES)}; fix deepspeed.communication_dtype"
            )

    def section(self) -> dict:
        """DeepSpeed's zero_optimization section."""
        return {"stage": 0}


@dataclass(frozen=True, kw_only=True)
class Zero1(Zero0):
    """reduce_bucket_size: elements summed over ranks at once; overlap_comm: start the sums while
    the last backward pass still runs (costs a hook per parameter)."""

    reduce_bucket_size: int
    overlap_comm: bool
    stage = 1

    def section(self) -> dict:
        return {
            "stage": self.stage,
            "reduce_bucket_size": self.reduce_bucket_size,
            "overlap_comm": self.overlap_comm,
            # Copying gradients into a bucket as they come needs hooks; without overlap they can
            # as well be flattened once, after the last backward pass.
            "contiguous_gradients": self.overlap_comm,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "allgather_bucket_size": self.reduce_bucket_size,
            "compute_grad_norm": False,  # the engine computes it
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "ignore_unused_parameters": True,
            "legacy_stage1": False,
            "elastic_checkpoint": False,
        }


@dataclass(frozen=True, kw_only=True)
class Zero2(Zero1):
    """As stage 1, but every micro-batch's gradients are summed over ranks."""

    stage = 2

    def section(self) -> dict:
        return {**super().section(), "contiguous_gradients": True}


@dataclass(frozen=True, kw_only=True)
class Zero3(Zero0):
    """prefetch_bucket_size: elements gathered ahead of their use; param_persistence_threshold:
    smaller parameters stay on every rank; max_live_parameters: elements gathered at once, at most;
    max_reuse_distance: keep what is used again within that many elements."""

    reduce_bucket_size: int
    overlap_comm: bool
    prefetch_bucket_size: int
    param_persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    stage = 3
    averages = True  # DeepSpeed has no sum at this stage

    def section(self) -> dict:
        return {
            "stage": 3,
            "reduce_bucket_size": self.reduce_bucket_size,
            "overlap_comm": self.overlap_comm,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "sub_group_size": 10**12,  # one flat tensor per parameter group
            "stage3_prefetch_bucket_size": self.prefetch_bucket_size,
            "stage3_param_persistence_threshold": self.param_persistence_threshold,
            "stage3_max_live_parameters": self.max_live_parameters,
            "stage3_max_reuse_distance": self.max_reuse_distance,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
            "memory_efficient_linear": False,  # it would replace torch's own linear function
            "override_module_apply": False,
            "ignore_unused_parameters": True,
        }


def for_ranks(zero: Zero0, ranks: int) -> Zero0:
    """The stage that is run. One rank has nothing to divide: at stages 1 and 2 DeepSpeed would only
    copy, gradients into a flat tensor and weights out of one (docs/optimizer_bytes.md)."""
    if ranks > 1 or zero.stage not in (1, 2):
        return zero
    log.info("one rank has nothing to divide: ZeRO stage %d is run as stage 0", zero.stage)
    return Zero0(communication_dtype=zero.communication_dtype)


def deepspeed_config(
    zero: Zero0, *, micro_batch: int, world_size: int, own_optimizer: bool = False
) -> dict:
    """The whole DeepSpeed configuration. own_optimizer: one that DeepSpeed does not know.

    Accumulation steps, clipping, skipping and the learning rate are the engine's; DeepSpeed sees
    one accumulation step per backward pass and is told the boundary.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * world_size,
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean" if zero.averages else "sum",
        "communication_data_type": zero.communication_dtype,
        "seq_parallel_communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": False},  # parameters are float32, the model casts its activations
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_optimization": zero.section(),
        "zero_allow_untested_optimizer": own_optimizer,
        "zero_force_ds_cpu_optimizer": False,
        "disable_python_gc": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
        "checkpoint": {"tag_validation": "Ignore", "load_universal": False},
    }
