"""Where the matrices of a parameter group lie on the ranks, and how they come together.

Orthogonalisation needs matrices whole. A rank's tensors of a group hold

    Whole       all of it, parameter by parameter: the only rank
    Shared      all of it on every rank (ZeRO-0): each rank works on a share, then all gather
    Partition   one slice of its parameters laid end to end (ZeRO-1 and 2), cut at any element. Of
                matrices that are cut, the owners exchange pieces, and each works on the whole, so
                that results need not travel

pieces() is called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from llmtrain_kernels.muon import iteration_cost
from torch import Tensor

from llmtrain.train.matrices import Matrix
from llmtrain.train.newton_schulz import orthogonalise


class Piece(NamedTuple):
    """A view of a rank's tensor, the orthogonalised update that belongs there (in the same shape),
    and the matrix that they are of."""

    view: Tensor
    result: Tensor
    matrix: Matrix


class Whole:
    """matrices: one list a tensor, with places in the flattened tensor."""

    def __init__(self, matrices: Sequence[Sequence[Matrix]]):
        self.matrices = [(i, matrix) for i, own in enumerate(matrices) for matrix in own]

    def pieces(
        self, tensors: list[Tensor], updates: list[Tensor], *, steps: int, dtype: torch.dtype
    ) -> list[Piece]:
        """What of the orthogonalised updates belongs where in the tensors."""
        whole = [matrix.of(updates[i].view(-1)) for i, matrix in self.matrices]
        return self.placed(tensors, orthogonalise(whole, steps=steps, dtype=dtype))

    def placed(self, tensors: list[Tensor], results: list[Tensor]) -> list[Piece]:
        return [
            Piece(matrix.of(tensors[i].view(-1)), result, matrix)
            for (i, matrix), result in zip(self.matrices, results, strict=True)
        ]


class Shared(Whole):
    """shares: rank -> numbers of the matrices that it works on, of about equal cost."""

    def __init__(self, matrices: Sequence[Sequence[Matrix]], rank: int, size: int, *, steps: int):
        super().__init__(matrices)
        self.rank, self.shares = rank, [[] for _ in range(size)]
        costs = [
            iteration_cost(1, matrix.rows, matrix.cols, steps, itemsize=2).flops
            for _, matrix in self.matrices
        ]
        work = [0.0] * size
        for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
            least = work.index(min(work))
            self.shares[least].append(number)
            work[least] += costs[number]
        sizes = [[self.matrices[n][1].numel for n in share] for share in self.shares]
        self.width = max(sum(share) for share in sizes)

    def pieces(
        self, tensors: list[Tensor], updates: list[Tensor], *, steps: int, dtype: torch.dtype
    ) -> list[Piece]:
        own = [self.matrices[number] for number in self.shares[self.rank]]
        whole = [matrix.of(updates[i].view(-1)) for i, matrix in own]
        results = orthogonalise(whole, steps=steps, dtype=dtype)
        packed = torch.zeros(self.width, dtype=dtype, device=tensors[0].device)
        for view, result in zip(self.unpack(packed, self.rank).values(), results, strict=True):
            view.copy_(result)
        gathered = packed.new_empty(len(self.shares) * self.width)
        dist.all_gather_into_tensor(gathered, packed)
        every: dict[int, Tensor] = {}
        for rank, row in enumerate(gathered.split(self.width)):
            every |= self.unpack(row, rank)
        return self.placed(tensors, [every[number] for number in range(len(every))])

    def unpack(self, packed: Tensor, rank: int) -> dict[int, Tensor]:
        """Number -> [rows, cols] view of a rank's results laid end to end."""
        views, start = {}, 0
        for number in self.shares[rank]:
            _, matrix = self.matrices[number]
            views[number] = packed[start : start + matrix.numel].view(matrix.rows, matrix.cols)
            start += matrix.numel
        return views


class Partition:
    """matrices: with places in the whole group, in order; length: of a rank's slice of it."""

    def __init__(self, matrices: Sequence[Matrix], *, length: int, rank: int, size: int):
        self.length, self.rank, self.size = length, rank, size
        self.own = [matrix for matrix in matrices if self.part(matrix, rank)]
        self.cut = [matrix for matrix in matrices if not self.inside(matrix)]
        # Other rank -> the matrices that it and this rank own pieces of.
        self.common: list[list[Matrix]] = [[] for _ in range(size)]
        for matrix in self.own:
            for other in self.owners(matrix):
                if other != rank:
                    self.common[other].append(matrix)

    def owners(self, matrix: Matrix) -> range:
        return range(matrix.start // self.length, (matrix.end - 1) // self.length + 1)

    def inside(self, matrix: Matrix) -> bool:
        return len(self.owners(matrix)) == 1

    def part(self, matrix: Matrix, rank: int) -> tuple[int, int] | None:
        """First and last + 1 of a matrix's elements in the whole group that a rank owns."""
        low = max(matrix.start, rank * self.length)
        high = min(matrix.end, (rank + 1) * self.length)
        return (low, high) if low < high else None

    def pieces(
        self, tensors: list[Tensor], updates: list[Tensor], *, steps: int, dtype: torch.dtype
    ) -> list[Piece]:
        (flat,), (update,) = tensors, updates
        received = self.exchange(update) if self.cut else {}
        first = self.rank * self.length
        whole = []
        for matrix in self.own:
            low, high = self.part(matrix, self.rank)
            own = update[low - first : high - first]
            if not self.inside(matrix):
                own = torch.cat(
                    [
                        own if rank == self.rank else received[rank, matrix.start]
                        for rank in self.owners(matrix)
                    ]
                )
            whole.append(own.view(matrix.rows, matrix.cols))
        found = []
        for matrix, result in zip(self.own, orthogonalise(whole, steps=steps, dtype=dtype)):
            low, high = self.part(matrix, self.rank)
            view = flat[low - first : high - first]
            if self.inside(matrix):
                found.append(Piece(view.view(result.shape), result, matrix))
            else:
                result = result.reshape(-1)[low - matrix.start : high - matrix.start]
                found.append(Piece(view, result, matrix))
        return found

    def exchange(self, update: Tensor) -> dict[tuple[int, int], Tensor]:
        """(rank, start of the matrix) -> that rank's elements, of the matrices in common."""
        first = self.rank * self.length
        sent, expected, keys = [], [], []
        for other, matrices in enumerate(self.common):
            for matrix in matrices:
                low, high = self.part(matrix, self.rank)
                sent.append(update[low - first : high - first])
                low, high = self.part(matrix, other)
                expected.append(high - low)
                keys.append((other, matrix.start))
        outgoing = torch.cat(sent) if sent else update.new_empty(0)
        incoming = outgoing.new_empty(sum(expected))
        dist.all_to_all_single(
            incoming, outgoing, self.elements_from_others(), self.elements_to_others()
        )
        return dict(zip(keys, incoming.split(expected), strict=True))

    def elements_to_others(self) -> list[int]:
        """Rank -> elements that this rank sends to it."""
        return [sum(self.count(m, self.rank) for m in matrices) for matrices in self.common]

    def elements_from_others(self) -> list[int]:
        """Rank -> elements that this rank gets from it."""
        return [
            sum(self.count(m, other) for m in matrices)
            for other, matrices in enumerate(self.common)
        ]

    def count(self, matrix: Matrix, rank: int) -> int:
        low, high = self.part(matrix, rank)
        return high - low
