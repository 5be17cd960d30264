"""Where a token is: added to its embedding, or rotated into queries and keys.

    none        nothing; recurrent mixers know the order anyway
    sinusoidal  x_t + [sin(t w_i), cos(t w_i)], w_i = 10000^(-2i/D)   Vaswani et al. 2017, sec. 3.5
    learned     x_t + table[t]                                        Gehring et al. 2017
    rope        pairs of q and k turned by t w_i                      Su et al. 2021, eq. 34

Positions count within a document. A module either adds to x_BTD or hands out a Rotary, which
rotary mixers apply. No buffer holds the frequencies, so that a model made on the meta device has
them too; they start on the host and go where the module goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from llmtrain_kernels.rope import rope
from torch import Tensor, nn

from llmtrain.context import Rotary, SequenceContext
from llmtrain.model.embedding import Embedding
from llmtrain.model.rope_scaling import attention_scale, inverse_frequencies


class NoPosition(nn.Module):
    """Adds nothing and rotates nothing; the base of the others."""

    rotary_kind: ClassVar[bool] = False  # hands out a Rotary, which no mixer may ignore

    def __init__(self, d_model: int, *, max_seq_len: int, rotary_widths: tuple[int, ...]):
        super().__init__()
        self.d_model, self.max_seq_len, self.rotary_widths = d_model, max_seq_len, rotary_widths
        self.frequencies: dict[int, Tensor] = {}  # width -> float64 [R]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The frequencies go where the module goes, in float64: copied from the host anew, they
        would make every forward pass wait, and no CUDA graph could hold it."""
        super()._apply(fn, recurse)
        for width, frequencies_R in self.frequencies.items():
            device = fn(frequencies_R).device
            if device.type != "meta":
                self.frequencies[width] = frequencies_R.to(device)
        return self

    def add(self, x_BTD: Tensor, ctx: SequenceContext) -> Tensor:
        """The embedded tokens with their positions added, in x's dtype."""
        return x_BTD

    def rotary(self, ctx: SequenceContext) -> dict[int, Rotary] | None:
        """The angles of every token for each of rotary_widths; None if not rotary."""
        return None


class Sinusoidal(NoPosition):
    """Fixed waves of D/2 frequencies; sines fill the first half of the width, cosines the rest."""

    def __init__(self, d_model: int, *, max_seq_len: int, rotary_widths: tuple[int, ...]):
        super().__init__(d_model, max_seq_len=max_seq_len, rotary_widths=rotary_widths)
        if d_model % 2:
            raise ValueError(
                f"position=sinusoidal: got d_model={d_model}, expected an even width; "
                "set model.d_model"
            )
        self.frequencies[d_model] = host_tensor(inverse_frequencies(d_model, theta=10000.0))

    def add(self, x_BTD: Tensor, ctx: SequenceContext) -> Tensor:
        angles_BTR = angles(ctx.positions_BT, self.frequencies[self.d_model])
        wave_BTD = torch.cat([angles_BTR.sin(), angles_BTR.cos()], dim=-1)
        return x_BTD + wave_BTD.to(x_BTD.dtype)


class Learned(NoPosition):
    """One trained vector for each of max_seq_len positions, N(0, init_std)."""

    def __init__(
        self,
        d_model: int,
        *,
        max_seq_len: int,
        rotary_widths: tuple[int, ...],
        init_std: float = 0.02,
    ):
        super().__init__(d_model, max_seq_len=max_seq_len, rotary_widths=rotary_widths)
        self.table = Embedding(d_model, vocab_size=max_seq_len, init_std=init_std)

    def add(self, x_BTD: Tensor, ctx: SequenceContext) -> Tensor:
        """ValueError when a document is longer than the table."""
        length = ctx.prefix_tokens + ctx.max_seqlen
        if length > self.max_seq_len:
            raise ValueError(
                f"position=learned: got a document of {length} tokens, expected at most "
                f"model.max_seq_len={self.max_seq_len}; raise it before training, shorten the "
                "rows or use position=rope"
            )
        return x_BTD + self.table(ctx.positions_BT).to(x_BTD.dtype)


class Rope(NoPosition):
    """Rotary embedding, with the usual ways to reach further than the model was trained for.

    rotary_widths: of the head parts that the mixers turn; each gets frequencies of its own.
    theta: base of the wavelengths. fraction: share of such a width that is rotated.
    interleaved: pairs are (0,1),(2,3).. (GPT-J) instead of (i, i + R) (Llama, GPT-NeoX).
    scaling and the knobs after it: llmtrain/model/rope_scaling.py; a knob that the chosen scaling
    does not use must be None.
    """

    rotary_kind = True

    def __init__(
        self,
        d_model: int,
        *,
        max_seq_len: int,
        rotary_widths: tuple[int, ...],
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        scaling: str = "none",
        factor: float | None = None,
        original_max_seq_len: int | None = None,
        beta_fast: float | None = None,
        beta_slow: float | None = None,
        low_freq_factor: float | None = None,
        high_freq_factor: float | None = None,
        attention_factor: float | None = None,
    ):
        super().__init__(d_model, max_seq_len=max_seq_len, rotary_widths=rotary_widths)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"position=rope: got fraction={fraction}, expected more than 0 and at most 1; "
                "use position=none to rotate nothing"
            )
        self.theta, self.scaling, self.interleaved = theta, scaling, interleaved
        self.fraction = fraction
        numbers = {
            "factor": factor,
            "original_max_seq_len": original_max_seq_len,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
        }
        self.frequencies = {
            width: host_tensor(
                inverse_frequencies(
                    turned_width(width, fraction), theta=theta, scaling=scaling, **numbers
                )
            )
            for width in rotary_widths
        }
        self.scale = attention_scale(scaling, factor, attention_factor)

    def rotary(self, ctx: SequenceContext) -> dict[int, Rotary]:
        tables = {}
        for width, frequencies_R in self.frequencies.items():
            angles_BTR = angles(ctx.positions_BT, frequencies_R)
            tables[width] = Rotary(
                cos_BTR=(angles_BTR.cos() * self.scale).float(),
                sin_BTR=(angles_BTR.sin() * self.scale).float(),
                interleaved=self.interleaved,
            )
        return tables


def turned_width(width: int, fraction: float) -> int:
    """How many of a head part's dimensions are turned. ValueError when they make no pairs."""
    turned = int(width * fraction)
    if turned % 2 or turned == 0:
        raise ValueError(
            f"position=rope: got a rotated width of {turned} (head width {width} x "
            f"fraction={fraction}), expected an even one; set position.fraction or the mixer's "
            "head_dim"
        )
    return turned


def host_tensor(frequencies: tuple[float, ...]) -> Tensor:
    """float64 on the CPU even inside `with torch.device("meta")`."""
    return torch.tensor(frequencies, dtype=torch.float64, device="cpu")


def angles(positions_BT: Tensor, frequencies_R: Tensor) -> Tensor:
    """float64 [B, T, R]: at position 100,000 float32 would already be off by 0.004 radians."""
    return positions_BT[..., None] * frequencies_R.to(positions_BT.device)


def apply_rotary(
    q_BTHK: Tensor, k_BTGK: Tensor | None, rotary: Rotary, *, part: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Turns the first 2R of every head's dimensions, or of its last `part`; keys may be None."""
    return rope(
        q_BTHK,
        k_BTGK,
        rotary.cos_BTR,
        rotary.sin_BTR,
        interleaved=rotary.interleaved,
        part=part,
    )
