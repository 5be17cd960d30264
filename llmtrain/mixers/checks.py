"""Checks of knobs that several mixers have. `mixer` is the name that a message begins with; all
raise ValueError."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def check_backend(mixer: str, backend: str, backends: Collection[str]) -> None:
    """One of the kernel's, or auto."""
    if backend not in ("auto", *backends):
        raise ValueError(
            f"{mixer}: got backend={backend!r}, expected auto or one of {', '.join(backends)}; "
            "set mixer.backend"
        )


def check_sizes(mixer: str, sizes: Mapping[str, int]) -> None:
    """Knob -> a size of at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{mixer}: got {name}={size}, expected at least 1; set mixer.{name}")


def check_optional_window(mixer: str, d_conv: int | None) -> None:
    """Tokens that a convolution sees, itself included, where there may be none."""
    if d_conv is not None and d_conv < 2:
        raise ValueError(
            f"{mixer}: got d_conv={d_conv}, expected at least 2, or null for no convolution; "
            "set mixer.d_conv"
        )


def check_time_steps(
    mixer: str, dt_min: float, dt_max: float, dt_floor: float, dt_limit: Sequence[float]
) -> None:
    """First time steps are log-uniform in [dt_min, dt_max], and at least dt_floor; all of them are
    kept within dt_limit."""
    if not 0 < dt_min <= dt_max or dt_floor <= 0:
        raise ValueError(
            f"{mixer}: got dt_min={dt_min}, dt_max={dt_max}, dt_floor={dt_floor}, expected "
            "0 < dt_min <= dt_max and dt_floor > 0; set mixer.dt_min, mixer.dt_max, mixer.dt_floor"
        )
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] < dt_limit[1]:
        raise ValueError(
            f"{mixer}: got dt_limit={list(dt_limit)}, expected [lowest, highest] with "
            "0 <= lowest < highest; set mixer.dt_limit"
        )


def check_rates(mixer: str, A_range: Sequence[float]) -> None:
    """First decay rates are uniform in this range."""
    if len(A_range) != 2 or not 0 < A_range[0] <= A_range[1]:
        raise ValueError(
            f"{mixer}: got A_range={list(A_range)}, expected [lowest, highest] with "
            "0 < lowest <= highest; set mixer.A_range"
        )
