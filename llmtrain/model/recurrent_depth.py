"""A core of layers applied again and again to a latent vector: depth is chosen at run time.

    e = prelude(embedded tokens)     normalised, where its last block does not end in a norm
    s_0 ~ N(0, latent_std^2), cut off at 3 standard deviations
    s_i = core(W [s_(i-1); e])       i = 1 .. r, W [D, 2D]
    hidden = norm(coda(norm(s_r)))   one norm, twice

Geiping et al. 2025 (arXiv:2502.05171), sections 3.1 to 3.3. In training r is drawn for every
step, the same for all of its rows, and s_0 for every row, so that neither depends on how rows are
divided among ranks and micro-batches (eq. 1 of section 3.3):

    t ~ N(log(repeats) - 1/8, 1/2),  r ~ Poisson(e^t) + 1        E r = repeats + 1

and gradients flow through the last backprop_repeats iterations only, into the core and through
their e into the prelude. Instead of W, injection="add" gives core(s_(i-1) + e) and "none"
core(s_(i-1)); the last with latent="prelude", s_0 = e, is the loop of the Universal Transformer
(Dehghani et al. 2018, arXiv:1807.03819). With "add" and a tied head the tokens' own embeddings
outweigh everything at first, and small models stand still at the unigrams: untie them. With W,
embedding.scale=sqrt(D), as published (section 3.2), keeps tokens apart and trains faster; at a rate
that a plain stack still bears they all become one vector, and the loss stays at the unigrams: lower
optimizer.lr to a third (docs/log.md).

At test time r is `repeats`, or what set_depth says. Each token's s_0 is then a function of its
position alone, so that rows, packed documents and single steps agree. With an exit_threshold a
generated token stops when |s_i - s_(i-1)| < threshold |s_i| (section 6.1); in the iterations that
it leaves out, later tokens find its last computed cache entries (section 6.2).

FLOPs: 4 D^2 for W and the core's, r times. State: one per application, prelude + r core + coda.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import State
from llmtrain.model.block import Block
from llmtrain.model.init import keyed_seed
from llmtrain.model.latent import position_keys, token_keys, truncated_normal
from llmtrain.model.linear import Linear
from llmtrain.model.stack import Stack, Walk

INJECTIONS = ("concat", "add", "none")
LATENTS = ("normal", "zeros", "prelude")
SAMPLINGS = ("lognormal_poisson", "fixed")
SIGMA = 0.5  # of the logarithm of r, as published


class RecurrentDepth(Stack):
    """layers: prelude, core and coda, in order. norm: makes a norm over D.

    prelude, coda: layers applied once, before and after the core. repeats: mean of r in training
    and r at test time. backprop_repeats: iterations that are differentiated, null for all.
    core_norm: the norm after the core, which is also the model's last. init_std: of W.
    """

    def __init__(
        self,
        layers: list[Block],
        *,
        d_model: int,
        norm: Callable[[], nn.Module],
        prelude: int = 1,
        coda: int = 1,
        repeats: int = 8,
        sampling: str = "lognormal_poisson",
        backprop_repeats: int | None = 4,
        injection: str = "concat",
        latent: str = "normal",
        latent_std: float = 0.4**0.5,
        core_norm: bool = True,
        init_std: float = 0.02,
    ):
        super().__init__(layers)
        choices = (
            ("sampling", sampling, SAMPLINGS),
            ("injection", injection, INJECTIONS),
            ("latent", latent, LATENTS),
        )
        for name, got, options in choices:
            if got not in options:
                raise ValueError(
                    f"{name}: got {got!r}, expected one of {', '.join(options)}; set stack.{name}"
                )
        check_sizes(len(layers), prelude, coda, repeats, backprop_repeats, latent_std)
        check_injection(injection, latent, backprop_repeats)
        end = len(layers) - coda
        self.prelude, self.core = self.order[:prelude], self.order[prelude:end]
        self.coda = self.order[end:]
        self.repeats, self.sampling, self.backprop_repeats = repeats, sampling, backprop_repeats
        self.injection, self.latent, self.latent_std = injection, latent, latent_std
        self.exit_threshold: float | None = None
        concat = injection == "concat"
        self.adapter = Linear(2 * d_model, d_model, init_std=init_std) if concat else None
        self.norm = norm() if core_norm else None
        normed = bool(self.prelude) and self.blocks[self.prelude[-1]].normalises_output
        self.injected_norm = None if normed or injection == "none" else norm()

    @property
    def applications(self) -> list[Block]:
        indices = (*self.prelude, *self.core * self.repeats, *self.coda)
        return [self.blocks[i] for i in indices]

    @property
    def differentiated(self) -> list[nn.Module]:
        """Those of r = repeats."""
        kept = self.repeats if self.backprop_repeats is None else self.backprop_repeats
        core: list[nn.Module] = [self.blocks[i] for i in self.core]
        core += [] if self.adapter is None else [self.adapter]
        once = [self.blocks[i] for i in (*self.prelude, *self.coda)]
        return once + core * min(kept, self.repeats)

    @property
    def normalises_output(self) -> bool:
        return self.norm is not None or super().normalises_output

    @property
    def draws_depth(self) -> bool:
        return self.sampling != "fixed"

    def drawn(
        self, ctx: SequenceContext, *, seed: int, step: int, first_row: int
    ) -> SequenceContext:
        """r, a pure function of seed and step, and the seeds of s_0, of seed, step and row."""
        if self.draws_depth:
            drawn = draw_repeats(keyed_seed(seed, f"repeats/{step}"), self.repeats)
            ctx = replace(ctx, repeats=drawn)
        if self.latent == "normal":
            # Made on the device: a copy from the host would wait. Neighbouring seeds are as good as
            # any (latent.py); the sum may wrap around.
            rows, device = ctx.positions_BT.shape[0], ctx.positions_BT.device
            number = keyed_seed(seed, f"latent/{step}")
            seeds_B = torch.arange(rows, device=device) + first_row + number
            ctx = replace(ctx, noise_seeds_B=seeds_B)
        return ctx

    def set_depth(self, *, repeats: int | None = None, exit_threshold: float | None = None) -> Self:
        """ValueError for r < 1, and when a token of the core cannot leave iterations out."""
        if repeats is not None:
            if repeats < 1:
                raise ValueError(f"repeats: got {repeats}, expected at least 1; set repeats=1")
            self.repeats = repeats
        if exit_threshold is not None:
            if exit_threshold <= 0:
                raise ValueError(
                    f"exit_threshold: got {exit_threshold}, expected more than 0 or null; "
                    "set exit_threshold=0.03"
                )
            for i in self.core:
                check_exit(self.blocks[i])
        self.exit_threshold = exit_threshold
        return self

    def run(self, x: Tensor, ctx: SequenceContext, walk: Walk) -> Tensor:
        repeats = self.repeats if ctx.repeats is None else ctx.repeats
        latent_ctx, ctx = ctx, replace(ctx, repeats=None, noise_seeds_B=None)
        for i in self.prelude:
            x = walk(i, x, ctx)
        if self.injected_norm is not None:
            x = self.injected_norm(x)
        latent = self.first_latent(x, latent_ctx)
        if walk.step and self.exit_threshold is not None:
            latent = self.iterate_until_still(latent, x, ctx, walk, repeats)
        else:
            latent = self.iterate(latent, x, ctx, walk, repeats)
        x = latent
        if self.coda and self.norm is not None:
            x = self.norm(x)
        for i in self.coda:
            x = walk(i, x, ctx)
        return x if self.norm is None else self.norm(x)

    def first_latent(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        """s_0 in the shape of x: x_BTD, or x_BD in a step."""
        if self.latent == "prelude":
            return x
        if self.latent == "zeros":
            return torch.zeros_like(x)
        if ctx.noise_seeds_B is None:
            keys_BT = position_keys(ctx.positions_BT)
        else:
            keys_BT = token_keys(ctx.noise_seeds_B, ctx.positions_BT.shape[1])
        dtype = torch.promote_types(x.dtype, torch.float32)
        noise_BTD = truncated_normal(keys_BT, x.shape[-1], dtype=dtype) * self.latent_std
        return (noise_BTD if x.ndim == 3 else noise_BTD[:, 0]).to(x.dtype)

    def iterate(
        self, latent: Tensor, embedded: Tensor, ctx: SequenceContext, walk: Walk, repeats: int
    ) -> Tensor:
        """s_r; the first iterations without gradient, where backprop_repeats is less than r."""
        kept = repeats if self.backprop_repeats is None else self.backprop_repeats
        for i in range(repeats):
            cut = i < repeats - kept and torch.is_grad_enabled()
            walk.takes_losses = not cut
            with torch.no_grad() if cut else nullcontext():
                latent = self.core_once(latent, embedded, ctx, walk)
        return latent

    def core_once(
        self, latent: Tensor, embedded: Tensor, ctx: SequenceContext, walk: Walk
    ) -> Tensor:
        if self.adapter is not None:
            latent = self.adapter(torch.cat([latent, embedded], dim=-1))
        elif self.injection == "add":
            latent = latent + embedded
        for i in self.core:
            latent = walk(i, latent, ctx)
        return latent

    def iterate_until_still(
        self, latent_BD: Tensor, embedded_BD: Tensor, ctx: SequenceContext, walk: Walk, repeats: int
    ) -> Tensor:
        """s of each row when it hardly changes any more, or s_r.

        A row's result does not depend on the others; the core is computed for all rows until the
        last of them is still.
        """
        dtype = torch.promote_types(latent_BD.dtype, torch.float32)
        still_B = torch.zeros_like(ctx.positions_BT[:, 0], dtype=torch.bool)
        width = len(self.core)
        for i in range(repeats):
            now_B = still_B
            if bool(still_B.all()):
                walk.states += walk.given[len(walk.states) : len(walk.states) + width]
            else:
                next_BD = self.core_once(latent_BD, embedded_BD, ctx, walk)
                next_BD = torch.where(still_B[:, None], latent_BD, next_BD)
                change_B, size_B = (
                    torch.linalg.vector_norm(z_BD, dim=-1, dtype=dtype)
                    for z_BD in (next_BD - latent_BD, next_BD)
                )
                now_B = still_B | (change_B < self.exit_threshold * size_B)
                latent_BD = next_BD
            if i > 0:
                last = zip(walk.states[-2 * width : -width], walk.states[-width:], strict=True)
                for index, (before, state) in zip(self.core, last, strict=True):
                    slots_B1 = self.blocks[index].mixer.cache_slots(state, ctx.positions_BT)
                    keep_entries(before, state, still_B, slots_B1)
            still_B = now_B
        return latent_BD

    def flops_per_token(self, tokens: int) -> float:
        """At r = repeats."""
        once, core = self.flops_of_parts(tokens)
        return once + self.repeats * core

    def train_flops_per_token(self, tokens: int) -> float:
        """The mean over r: forward through all iterations, backward through those kept."""
        once, core = self.flops_of_parts(tokens)
        if self.draws_depth:
            forward = self.repeats + 1.0
            kept = mean_kept(self.repeats, self.backprop_repeats)
        else:
            forward = float(self.repeats)
            kept = min(forward, self.backprop_repeats or math.inf)
        return 3.0 * once + core * (forward + 2.0 * kept)

    def flops_of_parts(self, tokens: int) -> tuple[float, float]:
        """Forward FLOPs per token of prelude and coda, and of one iteration."""
        once = sum(self.blocks[i].flops_per_token(tokens) for i in (*self.prelude, *self.coda))
        core = sum(self.blocks[i].flops_per_token(tokens) for i in self.core)
        return once, core + (0.0 if self.adapter is None else self.adapter.flops_per_token())


def check_sizes(
    n_layers: int,
    prelude: int,
    coda: int,
    repeats: int,
    backprop_repeats: int | None,
    latent_std: float,
) -> None:
    """ValueError for numbers out of range."""
    if min(prelude, coda) < 0 or n_layers - prelude - coda < 1:
        raise ValueError(
            f"got prelude={prelude} and coda={coda} of {n_layers} layers, expected numbers >= 0 "
            "that leave at least 1 layer to the core; lower stack.prelude or stack.coda, or raise "
            "model.n_layers"
        )
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1; set stack.repeats")
    if backprop_repeats is not None and backprop_repeats < 1:
        raise ValueError(
            f"backprop_repeats: got {backprop_repeats}, expected at least 1, or null for all; "
            "set stack.backprop_repeats"
        )
    if latent_std <= 0:
        raise ValueError(
            f"latent_std: got {latent_std}, expected more than 0; set stack.latent_std, or "
            "stack.latent=zeros"
        )


def check_injection(injection: str, latent: str, backprop_repeats: int | None) -> None:
    """ValueError when the prelude's output would not reach the core, or no gradient the prelude."""
    if injection == "none" and latent != "prelude":
        raise ValueError(
            f"injection: got none with latent={latent}, so that the core never sees the tokens, "
            "expected stack.latent=prelude with it; set either"
        )
    if injection == "none" and backprop_repeats is not None:
        raise ValueError(
            f"backprop_repeats: got {backprop_repeats} with injection=none, where the prelude gets "
            "gradients through the first iteration only, expected null; set "
            "stack.backprop_repeats=null, or another stack.injection"
        )


def check_exit(block: Block) -> None:
    """ValueError unless the state of a block is a cache with an entry for each token."""
    state = block.init_state(1, max_tokens=1, device="cpu", dtype=torch.float32)
    if block.mixer.cache_slots(state, torch.zeros(1, 1, dtype=torch.int64)) is None:
        raise ValueError(
            f"exit_threshold: the core's mixer {type(block.mixer).__name__} keeps no cache with "
            "entries of single tokens, so that no token can leave iterations out, expected "
            "attention or mla in the core; set exit_threshold=null"
        )


def keep_entries(before: State, state: State, still_B: Tensor, slots_B1: Tensor) -> None:
    """Write, in place, the entries of a token from one iteration's cache into the next one's, for
    the rows that are still."""
    where = (torch.arange(len(slots_B1), device=slots_B1.device)[:, None], slots_B1)
    for name, cache in state.items():
        old, new = before[name][where], cache[where]
        cache[where] = torch.where(still_B.view(-1, *[1] * (new.ndim - 1)), old, new)


def draw_repeats(seed: int, mean: int) -> int:
    """One r of the lognormal Poisson distribution."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((), generator=generator, dtype=torch.float64)
    rate = torch.exp(math.log(mean) - SIGMA**2 / 2 + SIGMA * normal)
    return int(torch.poisson(rate, generator=generator)) + 1


def mean_kept(mean: int, limit: int | None, points: int = 2001) -> float:
    """E min(r, limit) of that distribution: sum_(j < limit) P(r > j), over a grid of t."""
    if limit is None:
        return mean + 1.0
    z_N = torch.linspace(-8, 8, points, dtype=torch.float64, device="cpu")
    weight_N = torch.exp(-z_N.square() / 2)
    rate_N = torch.exp(math.log(mean) - SIGMA**2 / 2 + SIGMA * z_N)
    # P(Poisson >= j) is the regularised lower incomplete gamma function P(j, rate)
    beyond_N = torch.ones_like(z_N)
    for j in range(1, limit):
        beyond_N = beyond_N + torch.special.gammainc(torch.full_like(rate_N, j), rate_N)
    return float((weight_N * beyond_N).sum() / weight_N.sum())
