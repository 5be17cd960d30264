"""Which slice of every parameter this rank owns, at each ZeRO stage, as views one can copy into.

DeepSpeed keeps weights and optimizer state in flat tensors of its own making. Here they become
fragments: (parameter name, offset in the flattened parameter, views of that slice), the same at
all stages, so that a checkpoint written at one stage and world size is read at any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.train.optimizer import create_state


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A slice of a flattened parameter. views: kind -> 1-D float32 view of the live tensor; "param"
    is the weight, the others are what its optimizer keeps of it."""

    name: str
    offset: int
    views: dict[str, Tensor]


def group_states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of every tensor that the optimizer steps, group by group, made where missing."""
    return [
        create_state(optimizer, tensor, group["state"])
        for group in optimizer.param_groups
        for tensor in group["params"]
    ]


def slices(
    optimizer: torch.optim.Optimizer, group: int, tensor: Tensor, start: int, numel: int
) -> dict[str, Tensor]:
    """The views of a Fragment: elements of a tensor of that group, and of its state."""
    state = optimizer.state[tensor]
    kept = {kind: state[kind] for kind in optimizer.param_groups[group]["state"]}
    tensors = {"param": tensor.data, **kept}
    return {kind: t.view(-1).narrow(0, start, numel) for kind, t in tensors.items()}


def cut(pieces: list[Tensor], start: int, numel: int) -> Tensor:
    """Elements of the tensors laid end to end, copied."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(start, at), min(start + numel, at + piece.numel())
        if low < high:
            found.append(piece.reshape(-1)[low - at : high - at])
        at += piece.numel()
    return torch.cat(found)


class Replicated:
    """Stage 0: plain parameters, equal on every rank. Rank r writes slice r of each."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int):
        self.names = {p: name for name, p in module.named_parameters()}
        self.parameters = {name: p for p, name in self.names.items()}
        self.optimizer, self.rank, self.size = optimizer, rank, size
        self.states = group_states(optimizer)
        groups = enumerate(optimizer.param_groups)
        self.group_of = {p: i for i, group in groups for p in group["params"]}

    def gradients(self) -> list[Tensor]:
        """The step's gradients; rank 0 counts them, since all ranks have the same."""
        for parameter in self.names:
            if parameter.grad is None:  # it would be left out; at other stages it is zero
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in self.names]
        return grads if self.rank == 0 else [grads[0].new_zeros(1)]

    def gradient(self, fragment: Fragment) -> Tensor:
        """The step's gradient of a fragment, after gradients()."""
        grad = self.parameters[fragment.name].grad.reshape(-1)
        return grad.narrow(0, fragment.offset, fragment.views["param"].numel())

    def to_load(self) -> list[Fragment]:
        fragments = []
        for parameter, name in self.names.items():
            group = self.group_of[parameter]
            views = slices(self.optimizer, group, parameter, 0, parameter.numel())
            fragments.append(Fragment(name=name, offset=0, views=views))
        return fragments

    def to_save(self) -> list[Fragment]:
        fragments = []
        for whole in self.to_load():
            numel = whole.views["param"].numel()
            start = numel * self.rank // self.size
            end = numel * (self.rank + 1) // self.size
            views = {kind: view[start:end] for kind, view in whole.views.items()}
            fragments.append(Fragment(name=whole.name, offset=start, views=views))
        return [f for f in fragments if f.views["param"].numel()]

    def loaded(self) -> None:
        """To be called after the views were written."""

    def stepped(self) -> None:
        """To be called after an optimizer step."""


class FlatPartitions:
    """Stages 1 and 2: each parameter group is one flat tensor, cut evenly among the ranks.

    DeepSpeed clones this rank's slice to be the master weights; both are float32, so they become
    one, and its copy from one to the other after each step finds nothing to do.
    """

    def __init__(self, module: nn.Module, zero: object, rank: int):
        self.names = {p: name for name, p in module.named_parameters()}
        self.parameters = {name: p for p, name in self.names.items()}
        self.zero = zero
        slices_of_rank = [every[rank] for every in zero.parallel_partitioned_bit16_groups]
        for master, own in zip(zero.single_partition_of_fp32_groups, slices_of_rank, strict=True):
            assert (master.dtype, master.shape) == (own.dtype, own.shape)
            master.data = own.data
        self.states = group_states(zero.optimizer)

    def gradients(self) -> list[Tensor]:
        """The step's gradients of what this rank owns, summed over ranks."""
        return [grad for group in self.zero.averaged_gradients.values() for grad in group]

    def gradient(self, fragment: Fragment) -> Tensor:
        """The step's gradient of a fragment, after gradients()."""
        mapping = self.parameters[fragment.name]._hp_mapping
        at = mapping.get_hp_fragment_address()
        return cut(self.zero.averaged_gradients[mapping.param_group_index], at.start, at.numel)

    def to_load(self) -> list[Fragment]:
        fragments = []
        for parameter, name in self.names.items():
            mapping = parameter._hp_mapping
            if mapping is None:  # no part of it is in this rank's partition
                continue
            group = mapping.param_group_index
            flat = self.zero.single_partition_of_fp32_groups[group]
            at = mapping.get_hp_fragment_address()
            views = slices(self.zero.optimizer, group, flat, at.start, at.numel)
            offset = mapping.lp_fragment_address.start
            fragments.append(Fragment(name=name, offset=offset, views=views))
        return fragments

    to_save = to_load

    def loaded(self) -> None:
        self.zero.update_lp_params()

    def stepped(self) -> None:
        pass


class WeightPartitions:
    """Stage 3: every parameter is cut evenly among the ranks, the last slice padded."""

    def __init__(self, module: nn.Module, zero: object, rank: int):
        self.names = {p: name for name, p in module.named_parameters()}
        self.parameters = {name: p for p, name in self.names.items()}
        self.zero, self.rank = zero, rank
        # DeepSpeed puts its flat tensors into the groups only while it steps them.
        self.kinds = [group["state"] for group in zero.optimizer.param_groups]
        flats = zero.fp32_partitioned_groups_flat
        pairs = zip(flats, self.kinds, strict=True)
        self.states = [create_state(zero.optimizer, flat, kinds) for flat, kinds in pairs]

    def gradients(self) -> list[Tensor]:
        """The step's gradients of what this rank owns, summed over ranks; padding is zero."""
        return [grad for group in self.zero.averaged_gradients.values() for grad in group]

    def gradient(self, fragment: Fragment) -> Tensor:
        """The step's gradient of a fragment, after gradients()."""
        identity = self.zero.get_param_id(self.parameters[fragment.name])
        group, start, _ = self.zero.grad_position[identity]
        return cut(self.zero.averaged_gradients[group], start, fragment.views["param"].numel())

    def to_load(self) -> list[Fragment]:
        fragments = []
        for parameter, name in self.names.items():
            group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            offset = self.rank * length
            valid = min(length, parameter.ds_numel - offset)
            if valid <= 0:
                continue
            flat = self.zero.fp32_partitioned_groups_flat[group]
            views = slices(self.zero.optimizer, group, flat, start, valid)
            fragments.append(Fragment(name=name, offset=offset, views=views))
        return fragments

    to_save = to_load

    def loaded(self) -> None:
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def stepped(self) -> None:
        # A parameter that gets no gradient in the next step would keep this one's.
        self.zero.grad_partitions_flat_buffer.zero_()
