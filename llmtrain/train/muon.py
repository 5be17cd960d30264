"""Muon for the matrices of the blocks, AdamW for everything else.

Of every matrix W [rows, cols] with gradient G, momentum mu and learning rate eta:

    M = mu M + (1 - mu) G
    U = mu M + (1 - mu) G            with nesterov, else M
    W = (1 - eta wd) W - eta s NS(U)

NS orthogonalises (newton_schulz.py); s is sqrt(max(1, rows / cols)) for lr_scaling=original (Jordan
2024, https://kellerjordan.github.io/posts/muon/) and 0.2 sqrt(max(rows, cols)) for match_rms_adamw
(Liu et al. 2025, arXiv:2502.16982, equation 4), which gives updates the size of AdamW's. Equal to
torch.optim.Muon. With model.mup_base_width s grows from its value at the base as sqrt(rows / cols),
since the update's operator norm must (model/width.py). What counts as a matrix: matrices.py. Packed
projections are cut where their module declares it, experts and heads of a stack are matrices of
their own; all else is one matrix a parameter (q_proj with the output gate's rows between those of
its heads, MLA's kv_up).

Under ZeRO-1 and 2 a rank has a slice of the matrices laid end to end: momentum is updated there
element by element, matrices on a cut come together by one exchange (matrix_homes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llmtrain_kernels.muon import apply_updates, momentum_step
from llmtrain_kernels.tensor_lists import count_step
from torch import Tensor, nn

from llmtrain.train.matrices import Matrix, matrix_parameters
from llmtrain.train.matrix_homes import Partition, Piece, Shared, Whole
from llmtrain.train.optimizer import (
    Group,
    Members,
    OnePassAdamW,
    OptimizerMemory,
    by_width,
    check_limits,
    create_state,
    decay_groups,
)

# (rows, cols) -> s
SCALINGS: dict[str, Callable[[float, float], float]] = {
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STATE = ("momentum",)


# DeepSpeed replaces gradients by updates of its own where "muon" stands in the optimizer's name.
class OrthogonalMomentum(OnePassAdamW):
    """The optimizer. Groups with a key "matrices" (one list a parameter) are Muon's.

    ns_dtype: None for float16 on a GPU and the parameters' own dtype on a CPU. What is to be
    orthogonalised comes in bfloat16 instead of float16: it has not been divided by its norm yet.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: torch.dtype | None,
        lr_scaling: str,
    ):
        super().__init__(groups, betas=betas, eps=eps)
        self.momentum, self.nesterov = momentum, nesterov
        self.ns_steps, self.ns_dtype = ns_steps, ns_dtype
        self.scaling = SCALINGS[lr_scaling]
        self.homes = {
            group["name"]: Whole(group["matrices"]) for group in groups if "matrices" in group
        }

    def attach(self, *, rank: int, size: int, partitioned: bool) -> None:
        """Say how the ranks hold the groups, once DeepSpeed has put its tensors into them.

        partitioned: each group is one flat tensor, an even slice of its parameters end to end.
        """
        for group in self.param_groups:
            if "matrices" not in group:
                continue
            if partitioned:
                (flat,) = group["params"]
                matrices = end_to_end(group)
                home = Partition(matrices, length=flat.numel(), rank=rank, size=size)
            elif size > 1:
                home = Shared(group["matrices"], rank, size, steps=self.ns_steps)
            else:
                continue
            self.homes[group["name"]] = home

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the groups that are in param_groups now: DeepSpeed gives one at a time."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "matrices" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "matrices" in group:
                self.step_matrices(group)

    def step_matrices(self, group: dict) -> None:
        tensors = [parameter.detach() for parameter in group["params"]]
        dtype = self.dtype_for(tensors[0])
        averages = self.averages(group["params"], averages_dtype(dtype))
        pieces = self.homes[group["name"]].pieces(
            tensors, averages, steps=self.ns_steps, dtype=dtype
        )
        by_scale: dict[float, list[Piece]] = {}
        for piece in pieces:
            by_scale.setdefault(self.scale_of(piece.matrix), []).append(piece)
        lr = group["lr"]
        for scale, alike in by_scale.items():
            apply_updates(
                [piece.view for piece in alike],
                [piece.result for piece in alike],
                rate=lr * scale,
                decay=lr * group["weight_decay"],
                found_inf=self.found_inf,
            )

    def averages(self, parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Take the gradients into the momenta; what is to be orthogonalised, zero when the step is
        skipped (zero stays zero in the iteration, and nothing else changes then either)."""
        states = [create_state(self, parameter, STATE) for parameter in parameters]
        momenta = [state["momentum"] for state in states]
        gradients = [
            torch.zeros_like(mean) if parameter.grad is None else parameter.grad.contiguous()
            for parameter, mean in zip(parameters, momenta)
        ]
        count_step([state["step"] for state in states], self.found_inf)
        return momentum_step(
            gradients,
            momenta,
            momentum=self.momentum,
            nesterov=self.nesterov,
            dtype=dtype,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
        )

    def scale_of(self, matrix: Matrix) -> float:
        """s: that of the matrix at muP's base width, growing from there as sqrt(rows / cols)."""
        at_base = self.scaling(matrix.rows / matrix.row_growth, matrix.cols / matrix.col_growth)
        return at_base * math.sqrt(matrix.row_growth / matrix.col_growth)

    def dtype_for(self, tensor: Tensor) -> torch.dtype:
        if self.ns_dtype is not None:
            return self.ns_dtype
        return torch.float16 if tensor.is_cuda else tensor.dtype


def averages_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what an iteration in that dtype is given."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def end_to_end(group: dict) -> list[Matrix]:
    """The matrices of a group with their places when its parameters lie end to end."""
    moved, start = [], 0
    for matrices in group["matrices"]:
        moved += [matrix.moved(start) for matrix in matrices]
        start = moved[-1].end
    return moved


@dataclass(frozen=True, kw_only=True)
class Muon:
    """The knobs of configs/optimizer/muon.yaml."""

    lr: float
    adamw_lr: float
    lr_scaling: str
    momentum: float
    nesterov: bool
    ns_steps: int
    ns_dtype: str
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    decay_embeddings: bool

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("lr", "adamw_lr", "eps", "weight_decay"), (0, None))
        limits |= dict.fromkeys(("momentum", "beta1", "beta2"), (0, 1))
        check_limits(self, limits | {"ns_steps": (1, 100)})
        for name, options in (("lr_scaling", SCALINGS), ("ns_dtype", ("auto", *DTYPES))):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(options)}; "
                    f"fix optimizer.{name}"
                )
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov: has no effect with momentum=0; set optimizer.nesterov=false, or "
                "optimizer.momentum=0.95"
            )

    def check_stage(self, stage: int) -> None:
        """ValueError for ZeRO-3."""
        if stage == 3:
            raise ValueError(
                "optimizer=muon: got deepspeed=zero3, which cuts every matrix among all ranks, so "
                "that each step would gather all of them, expected zero0, zero1 or zero2; set "
                "deepspeed=zero2, or optimizer=adamw to keep deepspeed=zero3"
            )

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What Newton-Schulz computes in, of float32 parameters on that device."""
        if self.ns_dtype == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        return DTYPES[self.ns_dtype]

    def groups(self, model: nn.Module) -> dict[str, Members]:
        """ "matrices", "decay" and "no_decay" -> name -> parameter. ValueError: no matrix."""
        rest = decay_groups(model, decay_embeddings=self.decay_embeddings)
        matrices = matrix_parameters(model)
        if not matrices:
            raise ValueError(
                "muon: has no effect, the model's blocks have no matrices; set optimizer=adamw"
            )
        chosen = {name: p for name, p in model.named_parameters() if name in matrices}
        others = {
            group: {name: p for name, p in members.items() if name not in matrices}
            for group, members in rest.items()
        }
        return {"matrices": chosen, **others}

    def all_groups(self, model: nn.Module) -> list[Group]:
        """The groups with what is used to update them, empty ones too."""
        members = self.groups(model)
        lr, decay = self.lr, self.weight_decay
        return [
            Group(
                name="matrices",
                members=members["matrices"],
                lr=lr,
                weight_decay=decay,
                state=STATE,
            ),
            *by_width(
                Group(name="decay", members=members["decay"], lr=self.adamw_lr, weight_decay=decay),
                model,
            ),
            *by_width(
                Group(
                    name="no_decay", members=members["no_decay"], lr=self.adamw_lr, weight_decay=0.0
                ),
                model,
            ),
        ]

    def build(self, model: nn.Module) -> OrthogonalMomentum:
        """The optimizer over the model's parameters."""
        groups = [group.options() for group in self.all_groups(model) if group.members]
        groups[0]["matrices"] = list(matrix_parameters(model).values())
        return OrthogonalMomentum(
            groups,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            ns_dtype=DTYPES.get(self.ns_dtype),
            lr_scaling=self.lr_scaling,
        )

    def describe(self, model: nn.Module) -> str:
        """One line per group, and what is in it: last parts of the parameters' names."""
        cuts = matrix_parameters(model)
        lines = []
        for group in self.all_groups(model):
            line = group.describe(lr=True)
            if group.name == "matrices":
                line += f", Muon on {sum(map(len, cuts.values())):,} matrices"
            lines.append(line)
            kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in group.members)
            lines += [f"    {', '.join(kinds)}"] if kinds else []
        return "\n".join(lines)

    def memory(self, model: nn.Module) -> OptimizerMemory:
        """One value kept of a matrix's element, two of another; while it steps, averages, batches
        and results, counted as float32 (in 16 bits it is half)."""
        count = sum(parameter.numel() for parameter in model.parameters())
        matrices = sum(matrix.numel for cut in matrix_parameters(model).values() for matrix in cut)
        return OptimizerMemory(state=2 * count - matrices, step=3 * matrices)
