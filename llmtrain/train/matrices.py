"""Which parameters are matrices, and what each is cut into: the rule behind optimizer=muon.

A matrix maps vectors to vectors inside a block. By rule:

    weight of an nn.Linear        one matrix, unless its module names it in no_matrices
    a parameter in `matrices`     [..., out, in]: a stack of matrices, such as all experts'
    all others                    none: norms, biases, convolution kernels, decay rates, tables

and nothing of embedding, position, head and final norm, nor what no_weight_decay lists.
matrix_splits says where projections are packed into one parameter: {name: (rows, rows, ...)} cuts
each matrix of it along its output dimension. Class or instance attributes of any module:

    matrices = ("gate_up", "down")          own parameters
    no_matrices = ("router.weight",)        gates and routers, relative to the module
    matrix_splits = {"gate_up": (F, F)}     relative too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmtrain.model.width import width_of

# Attributes of a language model that lie outside of its blocks.
OUTSIDE = ("embedding", "position", "head", "norm")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Elements start .. start + rows * cols of something flat, row by row.

    row_growth, col_growth: against the base width of muP (model/width.py); 1 without it.
    """

    start: int
    rows: int
    cols: int
    row_growth: float = 1.0
    col_growth: float = 1.0

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def end(self) -> int:
        return self.start + self.numel

    def moved(self, by: int) -> Matrix:
        """The same matrix in something flat that has `by` elements more before it."""
        return replace(self, start=self.start + by)

    def of(self, flat: Tensor) -> Tensor:
        """[rows, cols], a view."""
        return flat[self.start : self.end].view(self.rows, self.cols)


def matrix_parameters(model: nn.Module) -> dict[str, list[Matrix]]:
    """Name of a parameter -> the matrices it consists of, in the order of the model's parameters.

    model: a language model, or a module that holds one as `model`.
    """
    chosen: set[str] = set()
    refused: set[str] = set()
    splits: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Linear):
            chosen.add(f"{prefix}weight")
        chosen |= {prefix + name for name in named(module, path, "matrices")}
        for fact in ("no_matrices", "no_weight_decay"):
            refused |= {prefix + name for name in named(module, path, fact)}
        for name in named(module, path, "matrix_splits"):
            splits[prefix + name] = module.matrix_splits[name]
    found = {}
    width, prefix = width_of(model)
    for name, parameter in model.named_parameters():
        inside = name.removeprefix("model.").split(".")[0] not in OUTSIDE
        if not inside or name not in chosen or name in refused:
            continue
        growth = None if width is None else partial(width.growths, name.removeprefix(prefix))
        found[name] = list(cut(name, parameter.shape, splits.get(name), growth))
    return found


def named(module: nn.Module, path: str, fact: str) -> list[str]:
    """The parameters that a module lists in one of its facts; those it was built without left out.
    ValueError for one that it cannot have."""
    names = []
    for name in getattr(module, fact, ()):
        owner: object = module
        for part in name.split("."):
            if not hasattr(owner, part):
                raise ValueError(
                    f"{path or type(module).__name__}: {fact} lists {name!r}, but the module has "
                    f"no such parameter; fix {fact} of {type(module).__name__}"
                )
            owner = getattr(owner, part)
            if owner is None:
                break
        if owner is not None:
            names.append(name)
    return names


def cut(
    name: str,
    shape: torch.Size,
    rows: tuple[int, ...] | None,
    growth: Callable[[tuple[int, ...]], tuple[list[float], float]] | None = None,
) -> Iterator[Matrix]:
    """The matrices of a parameter [..., out, in]; rows: of each of those packed in `out`. growth:
    rows -> (row_growth of each, col_growth)."""
    if len(shape) < 2:
        raise ValueError(f"{name}: got shape {list(shape)}, expected [..., out, in] of a matrix")
    *stack, out, cols = shape
    rows = (out,) if rows is None else tuple(rows)
    if sum(rows) != out or min(rows) < 0:
        raise ValueError(
            f"{name}: matrix_splits gives {rows}, expected numbers of rows that sum up to {out}"
        )
    start = 0
    row_growths, col_growth = ([1.0] * len(rows), 1.0) if growth is None else growth(rows)
    for _ in range(torch.Size(stack).numel()):
        for height, row_growth in zip(rows, row_growths, strict=True):
            if height:
                facts = {"row_growth": row_growth, "col_growth": col_growth}
                yield Matrix(start=start, rows=height, cols=cols, **facts)
                start += height * cols
