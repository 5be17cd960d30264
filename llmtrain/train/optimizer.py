"""AdamW with two groups of parameters: those that decay and those that do not.

No decay: norms, biases and everything else with fewer than two dimensions; what a module lists in
no_weight_decay; and the embeddings, unless decay_embeddings. Loshchilov and Hutter 2019,
arXiv:1711.05101. The kernel is torch's fused one, on CUDA and on the CPU: besides speed it takes
the clipping factor and the skip flag as tensors, so that a step needs no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

# Attributes of a language model that hold lookup tables.
EMBEDDINGS = ("embedding", "position")


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
        limits |= {"beta1": (0, 1), "beta2": (0, 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value < low or (high is not None and value >= high):
                expected = f"at least {low}" + ("" if high is None else f" and below {high}")
                raise ValueError(f"{name}: got {value}, expected {expected}; fix optimizer.{name}")

    def groups(self, model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
        """ "decay" and "no_decay" -> name -> parameter.

        model: a language model, or a module that holds one as `model`.
        """
        listed = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            for name in getattr(module, "no_weight_decay", ())
        }
        groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
        known = dict(model.named_parameters())
        for name in sorted(listed - known.keys()):
            raise ValueError(
                f"{name}: listed in no_weight_decay, but the model has no such parameter; "
                "fix the list of its module"
            )
        for name, parameter in known.items():
            table = name.removeprefix("model.").split(".")[0] in EMBEDDINGS
            plain = parameter.ndim >= 2 and name not in listed
            plain = plain and (self.decay_embeddings or not table)
            groups["decay" if plain else "no_decay"][name] = parameter
        return groups

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer over the model's parameters."""
        decay = {"decay": self.weight_decay, "no_decay": 0.0}
        groups = [
            {"params": list(members.values()), "weight_decay": decay[name]}
            for name, members in self.groups(model).items()
            if members
        ]
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )

    def describe(self, model: nn.Module) -> str:
        """One line per group: its decay, tensors and parameters."""
        lines = []
        for name, members in self.groups(model).items():
            decay = self.weight_decay if name == "decay" else 0.0
            count = sum(parameter.numel() for parameter in members.values())
            row = f"  {name:<9}weight decay {decay:<5g} {len(members):>5} tensors"
            lines.append(f"{row} {count:>14,} parameters")
        return "\n".join(lines)
