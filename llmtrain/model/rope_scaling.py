"""The frequencies of rotary embedding, and their changes for contexts longer than trained.

Pair i of a width of 2R turns by w_i = theta^(-i/R) radians a token. A model trained on L0 tokens
(original_max_seq_len) reaches s L0 (s = factor) when the slow pairs turn s times slower:

    linear  w / s                                              Chen et al. 2023, arXiv:2306.15595
    ntk     theta s^(R/(R-1)): the fastest pair keeps w, the slowest gets w / s
    yarn    w / s for pairs that turn less than beta_slow times in L0 tokens, w for those that turn
            more than beta_fast times, a ramp over i in between; cosines and sines are scaled by
            attention_factor, 0.1 ln s + 1 if not given (1 where the mixer scales all scores, as
            latent attention's yarn_factor does)                Peng et al. 2023, arXiv:2309.00071
    llama3  the same idea with a ramp over the number of turns, from low_freq_factor to
            high_freq_factor, and no scale                      Llama 3.1 model card, 2024

Plain floats of the host, computed once in float64.
"""

from __future__ import annotations

import math

# The numbers that each scaling reads, with the value of those that have a usual one.
NUMBERS: dict[str, dict[str, float | None]] = {
    "none": {},
    "linear": {"factor": None},
    "ntk": {"factor": None},
    "yarn": {
        "factor": None,
        "original_max_seq_len": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "llama3": {
        "factor": None,
        "original_max_seq_len": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def scaling_numbers(scaling: str, given: dict[str, float | None]) -> dict[str, float]:
    """The numbers of a scaling, defaults filled in.

    Raises ValueError for an unknown scaling, a number it needs and lacks, or one it ignores.
    """
    if scaling not in NUMBERS:
        raise ValueError(
            f"position=rope: got scaling={scaling!r}, expected one of {', '.join(NUMBERS)}; "
            "set position.scaling"
        )
    used = NUMBERS[scaling]
    ignored = [name for name, value in given.items() if value is not None and name not in used]
    if ignored:
        raise ValueError(
            f"position=rope: got {', '.join(ignored)}, which scaling={scaling} ignores, expected "
            f"only {', '.join(used) or 'no number'}; set the others to null or change "
            "position.scaling"
        )
    numbers = {}
    for name, default in used.items():
        value = default if given[name] is None else given[name]
        if value is None or value <= 0 or (name == "factor" and value < 1):
            least = "at least 1" if name == "factor" else "a positive number"
            raise ValueError(
                f"position=rope: got {name}={value} with scaling={scaling}, expected {least}; "
                f"set position.{name}"
            )
        numbers[name] = value
    return numbers


def inverse_frequencies(
    width: int,
    *,
    theta: float,
    scaling: str = "none",
    factor: float | None = None,
    original_max_seq_len: int | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
) -> tuple[float, ...]:
    """Radians a token of the width/2 pairs, fastest first. ValueError as scaling_numbers."""
    if theta <= 1:
        raise ValueError(
            f"position=rope: got theta={theta}, expected more than 1; set model.rope_theta"
        )
    n = scaling_numbers(
        scaling,
        {
            "factor": factor,
            "original_max_seq_len": original_max_seq_len,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
        },
    )
    pairs = width // 2
    if scaling == "ntk":
        if pairs < 2:
            raise ValueError(
                f"position=rope: got a rotated width of {width} with scaling=ntk, expected at "
                "least 4; set position.fraction or the mixer's head_dim"
            )
        theta = theta * n["factor"] ** (pairs / (pairs - 1))
    plain = [theta ** (-i / pairs) for i in range(pairs)]
    if scaling == "linear":
        return tuple(w / n["factor"] for w in plain)
    if scaling == "yarn":
        ramp = yarn_ramp(pairs, theta, n["original_max_seq_len"], n["beta_fast"], n["beta_slow"])
    elif scaling == "llama3":
        turns = [n["original_max_seq_len"] * w / (2 * math.pi) for w in plain]
        low, high = n["low_freq_factor"], n["high_freq_factor"]
        if low >= high:
            raise ValueError(
                f"position=rope: got low_freq_factor={low} and high_freq_factor={high}, expected "
                "the first to be smaller; set position.low_freq_factor"
            )
        ramp = [clamp((turn - low) / (high - low)) for turn in turns]
    else:
        return tuple(plain)
    # share 1: the frequency as trained, share 0: slowed by the factor
    return tuple(w * share + w / n["factor"] * (1 - share) for w, share in zip(plain, ramp))


def yarn_ramp(
    pairs: int, theta: float, trained: float, beta_fast: float, beta_slow: float
) -> list[float]:
    """Share of the trained frequency that pair i keeps; linear between two whole pair numbers."""

    def pair_of(turns: float) -> float:
        """The pair that makes that many turns in `trained` tokens."""
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_of(beta_fast)), 0)
    last = min(math.ceil(pair_of(beta_slow)), 2 * pairs - 1)
    length = max(last - first, 0.001)
    return [1 - clamp((i - first) / length) for i in range(pairs)]


def attention_scale(scaling: str, factor: float | None, given: float | None = None) -> float:
    """What cosines and sines are multiplied by: YaRN's temperature (arXiv:2309.00071, eq. 22), or
    the given one. ValueError when one is given that has no effect, or is not positive."""
    if given is not None and (scaling != "yarn" or given <= 0):
        raise ValueError(
            f"position=rope: got attention_factor={given} with scaling={scaling}, expected a "
            "positive number with scaling=yarn, else null; set position.attention_factor"
        )
    if scaling != "yarn" or factor is None:
        return 1.0
    return yarn_temperature(factor) if given is None else given


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln factor + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def clamp(share: float) -> float:
    return min(max(share, 0.0), 1.0)
