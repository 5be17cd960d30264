"""Width transfer (muP): a model whose best learning rate is that of a narrower one, the base.

Yang et al. 2022 (arXiv:2203.03466), tables 3 and 8; for Muon the spectral condition of Yang,
Simon and Bernstein 2023 (arXiv:2310.17813). With m = d_model / base, relative to the base:

                       first std     AdamW's lr   weight decay   Muon's update
    hidden             1 / sqrt(m)   1 / m        m              1
    to a fixed size    1 / m         1 / m        m              1 / sqrt(m)
    all else           1             1            1              sqrt(m)
    logits: hidden vectors are multiplied by 1 / m before the head, tied or not
    scores of attention whose heads grow with the width: 1 / head_dim instead of 1 / sqrt(head_dim)

Muon's column: the operator norm sqrt(rows / cols) of the update, whatever lr_scaling says. Decay:
AdamW multiplies it by lr, and what a weight forgets in a step, lr x decay, shall not change with
the width (Wang and Aitchison 2024, arXiv:2405.13698, section 4.2).

What grows is seen by comparing the shapes of two models, not by names. Parameters that map vectors
to vectors, [..., out, in], are weights of nn.Linear and what a module lists in `matrices`: hidden
when both grow, to a fixed size (routers, selected states, single key heads) when only the input
does. Others with two growing dimensions are hidden too. All else - embeddings, positions, the head,
gains, biases, convolution kernels, matrices of one head of fixed width, whatever reads a fixed
size - is as at the base. A packed parameter, cut in a module's matrix_splits or init_splits, has
rows of different kinds. First values are drawn as without muP and then multiplied; a module lists
in scaled_init what it draws with a factor 1 / sqrt(width) already.

A gated layer with a fixed number of hidden units (channel.hidden=256 at any width) starts ever
closer to a saddle, as both factors of its products shrink: let it grow too. Not scaled: AdamW's eps
and the gradient's clipping, whose meaning drifts with the width as without muP; depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a parameter grows with the width. reads: its inputs do; rows: (number, whether they
    grow) of its packed outputs; scaled: its first values have a factor 1 / sqrt(width)."""

    reads: bool
    rows: tuple[tuple[int, bool], ...]
    scaled: bool

    def exponents(self) -> list[tuple[int, float]]:
        """(rows, e): these rows' first values are to be multiplied by m^e."""
        drawn = 0.5 if self.scaled else 0.0
        wanted = (0.5 if grows else 1.0 for _, grows in self.rows) if self.reads else None
        if wanted is None:
            return [(count, drawn) for count, _ in self.rows]
        return [(count, drawn - w) for (count, _), w in zip(self.rows, wanted, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Width:
    """m, and the growth of every parameter by its name in the language model."""

    multiplier: float
    growth: dict[str, Growth]

    def lr_factor(self, name: str) -> float:
        """Of AdamW's learning rate."""
        return 1 / self.multiplier if self.growth[name].reads else 1.0

    def growths(self, name: str, rows: tuple[int, ...]) -> tuple[list[float], float]:
        """m or 1 for each of these packed numbers of rows, and for the columns."""
        growth = self.growth[name]
        found = growth.rows
        if tuple(count for count, _ in found) != rows:
            found = [(count, any(grows for _, grows in found)) for count in rows]
        of_rows = [self.multiplier if grows else 1.0 for _, grows in found]
        return of_rows, self.multiplier if growth.reads else 1.0

    @torch.no_grad()
    def scale_first_values(self, model: nn.Module) -> None:
        """Multiply them, in place, to what they are to be at this width."""
        if self.multiplier == 1:
            return
        for name, parameter in model.named_parameters():
            exponents = self.growth[name].exponents()
            if not any(exponent for _, exponent in exponents):
                continue
            factors = [self.multiplier**e for _, e in exponents]
            if parameter.ndim < 2:
                parameter.mul_(factors[0])
                continue
            parts = parameter.split([count for count, _ in exponents], dim=-2)
            for part, factor in zip(parts, factors, strict=True):
                part.mul_(factor)


def compare(model: nn.Module, wider: nn.Module, multiplier: float) -> Width:
    """model: a language model; wider: the same at another width, only its shapes are read."""
    maps, splits, scaled = declared(model)
    wide_splits = declared(wider)[1]
    shapes = {name: parameter.shape for name, parameter in wider.named_parameters()}
    growth = {}
    for name, parameter in model.named_parameters():
        grows = [a != b for a, b in zip(parameter.shape, shapes[name], strict=True)]
        outside = name.split(".")[0] in ("embedding", "position", "head")
        if parameter.ndim < 2:
            rows = ((parameter.shape[0], grows[0]),)
        else:
            here = splits.get(name, (parameter.shape[-2],))
            there = wide_splits.get(name, (shapes[name][-2],))
            rows = tuple((a, a != b) for a, b in zip(here, there, strict=True))
        reads = not outside and (grows[-1] if name in maps else sum(grows) >= 2)
        growth[name] = Growth(reads=reads, rows=rows, scaled=name in scaled)
    return Width(multiplier=multiplier, growth=growth)


def declared(model: nn.Module) -> tuple[set[str], dict[str, tuple[int, ...]], set[str]]:
    """What modules say of parameters, by name: those that map vectors; packed rows; scaled_init."""
    maps: set[str] = set()
    scaled: set[str] = set()
    splits: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = ["weight"] if isinstance(module, nn.Linear) else []
        maps |= {prefix + name for name in (*own, *getattr(module, "matrices", ()))}
        scaled |= {prefix + name for name in getattr(module, "scaled_init", ())}
        for fact in ("matrix_splits", "init_splits"):
            for name, rows in getattr(module, fact, {}).items():
                splits[prefix + name] = tuple(rows)
    return maps, splits, scaled


def width_of(model: nn.Module) -> tuple[Width | None, str]:
    """The Width of a language model, or of one that a module holds as `model`, and the prefix of
    its parameters' names there."""
    inner = getattr(model, "model", model)
    return getattr(inner, "width", None), "" if inner is model else "model."
