"""AdamW with two groups of parameters: those that decay and those that do not. With
model.mup_base_width those whose learning rate depends on the width are groups of their own.

No decay: norms, biases and everything else with fewer than two dimensions; what a module lists in
no_weight_decay; and the embeddings, unless decay_embeddings. Loshchilov and Hutter 2019,
arXiv:1711.05101. The step is llmtrain_kernels.adamw's one pass on CUDA, torch's fused kernel on the
CPU: besides speed they take the clipping factor and the skip flag as tensors, so that a step needs
no host synchronisation.

What the engine needs of any optimizer: groups with the keys of Group.options(); grad_scale and
found_inf, set before each step, which divide the gradients and, when 1, stop every change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from llmtrain_kernels.adamw import adamw_step
from torch import Tensor, nn

from llmtrain.model.width import width_of

# Attributes of a language model that hold lookup tables.
EMBEDDINGS = ("embedding", "position")
# State that AdamW keeps of every element.
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
# Name -> parameter.
Members = dict[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are updated alike. lr: at the schedule's peak; state: what is kept of every
    element, by the names that it has in optimizer.state and in checkpoints."""

    name: str
    members: Members
    lr: float
    weight_decay: float
    state: tuple[str, ...] = ADAMW_STATE

    def options(self) -> dict:
        """The group as torch wants it. names: of the parameters, in order."""
        return {
            "params": list(self.members.values()),
            "names": list(self.members),
            "name": self.name,
            "lr": self.lr,
            "initial_lr": self.lr,
            "weight_decay": self.weight_decay,
            "state": self.state,
        }

    def describe(self, *, lr: bool) -> str:
        """Decay, tensors and parameters; lr: too."""
        rate = f"lr {self.lr:<8g}" if lr else ""
        count = sum(parameter.numel() for parameter in self.members.values())
        row = f"  {self.name:<15}{rate}weight decay {self.weight_decay:<5g} "
        return f"{row}{len(self.members):>5} tensors {count:>14,} parameters"


@dataclass(frozen=True, kw_only=True)
class OptimizerMemory:
    """Numbers of float32 values. state: kept, without the weights; step: temporary, while it
    steps."""

    state: int
    step: int


def create_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, kinds: tuple[str, ...]
) -> dict[str, Tensor]:
    """The state of a tensor, made as torch would at the first step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for kind in kinds:
            state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state


class OnePassAdamW(torch.optim.AdamW):
    """torch's, with one pass over memory a step. Groups as Group.options() gives them."""

    def __init__(self, groups: list[dict], *, betas: tuple[float, float], eps: float):
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the groups that are in param_groups now: DeepSpeed gives one at a time."""
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            states = [create_state(self, p, group["state"]) for p in stepped]
            adamw_step(
                [p.detach() for p in stepped],
                [p.grad.contiguous() for p in stepped],
                *([state[kind] for state in states] for kind in (*ADAMW_STATE, "step")),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
            )


def decay_groups(model: nn.Module, *, decay_embeddings: bool) -> dict[str, Members]:
    """ "decay" and "no_decay" -> name -> parameter.

    model: a language model, or a module that holds one as `model`.
    """
    listed = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    groups: dict[str, Members] = {"decay": {}, "no_decay": {}}
    known = dict(model.named_parameters())
    for name in sorted(listed - known.keys()):
        raise ValueError(
            f"{name}: listed in no_weight_decay, but the model has no such parameter; "
            "fix the list of its module"
        )
    for name, parameter in known.items():
        table = name.removeprefix("model.").split(".")[0] in EMBEDDINGS
        plain = parameter.ndim >= 2 and name not in listed
        plain = plain and (decay_embeddings or not table)
        groups["decay" if plain else "no_decay"][name] = parameter
    return groups


def by_width(group: Group, model: nn.Module) -> list[Group]:
    """The group, and with muP the part of it whose learning rate has a factor (model/width.py).

    lr x weight_decay is the same in both: what a weight forgets in a step.
    """
    width, prefix = width_of(model)
    if width is None or width.multiplier == 1:
        return [group]
    parts: dict[float, Members] = {1.0: {}, 1 / width.multiplier: {}}
    for name, parameter in group.members.items():
        parts[width.lr_factor(name.removeprefix(prefix))][name] = parameter
    groups = []
    for factor, members in parts.items():
        name = group.name if factor == 1 else f"{group.name}_width"
        changed = {"lr": group.lr * factor, "weight_decay": group.weight_decay / factor}
        groups.append(replace(group, name=name, members=members, **changed))
    return [part for part in groups if part.members or part.name == group.name]


def check_limits(knobs: object, limits: dict[str, tuple[float, float | None]]) -> None:
    """ValueError for a knob below its least value, or not below its bound. None: no bound."""
    for name, (low, high) in limits.items():
        value = getattr(knobs, name)
        if value < low or (high is not None and value >= high):
            expected = f"at least {low}" + ("" if high is None else f" and below {high}")
            raise ValueError(f"{name}: got {value}, expected {expected}; fix optimizer.{name}")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The knobs of configs/optimizer/adamw.yaml."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decay_embeddings: bool

    def __post_init__(self) -> None:
        limits = {"lr": (0, None), "eps": (0, None), "weight_decay": (0, None)}
        check_limits(self, limits | {"beta1": (0, 1), "beta2": (0, 1)})

    def check_stage(self, stage: int) -> None:
        """Every ZeRO stage will do: it updates each element by itself."""

    def groups(self, model: nn.Module) -> dict[str, Members]:
        """ "decay" and "no_decay" -> name -> parameter."""
        return decay_groups(model, decay_embeddings=self.decay_embeddings)

    def all_groups(self, model: nn.Module) -> list[Group]:
        """The groups with what is used to update them, empty ones too."""
        decay = {"decay": self.weight_decay, "no_decay": 0.0}
        return [
            part
            for name, members in self.groups(model).items()
            for part in by_width(
                Group(name=name, members=members, lr=self.lr, weight_decay=decay[name]), model
            )
        ]

    def build(self, model: nn.Module) -> OnePassAdamW:
        """The optimizer over the model's parameters."""
        groups = [group.options() for group in self.all_groups(model) if group.members]
        return OnePassAdamW(groups, betas=(self.beta1, self.beta2), eps=self.eps)

    def describe(self, model: nn.Module) -> str:
        """One line per group: its decay, tensors and parameters."""
        groups = self.all_groups(model)
        rates = len({group.lr for group in groups}) > 1
        return "\n".join(group.describe(lr=rates) for group in groups)

    def memory(self, model: nn.Module) -> OptimizerMemory:
        """What it keeps of the whole model."""
        count = sum(parameter.numel() for parameter in model.parameters())
        return OptimizerMemory(state=2 * count, step=0)
