"""Checks of arguments that several recurrences share; every message begins with the operation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_choice(operation: str, name: str, got: str | None, options: Sequence[str | None]) -> None:
    """ValueError for a name that is not offered."""
    if got not in options:
        offered = ", ".join(map(str, options))
        raise ValueError(f"{operation}: got {name}={got!r}, expected one of {offered}; set {name}")


def check_backend(operation: str, got: str, backends: Sequence[str]) -> None:
    """ValueError for an unknown backend."""
    if got not in ("auto", *backends):
        raise ValueError(
            f"{operation}: got backend={got!r}, expected auto or one of {', '.join(backends)}; "
            "set backend"
        )


def check_heads(
    operation: str, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, numbers: dict[str, Tensor]
) -> None:
    """ValueError unless queries and keys are of one shape, their groups divide the heads, and rows
    and tokens are those of the values. numbers: name -> what there is one of a token and head."""
    batch, tokens, heads = v_BTHV.shape[:3]
    if q_BTGK.shape != k_BTGK.shape or heads % k_BTGK.shape[2]:
        raise ValueError(
            f"{operation}: got queries {tuple(q_BTGK.shape)}, keys {tuple(k_BTGK.shape)} and "
            f"{heads} value heads, expected queries and keys of one shape whose groups divide the "
            "heads; change the number of groups or heads"
        )
    for name, tensor in numbers.items():
        if k_BTGK.shape[:2] != (batch, tokens) or tensor.shape != (batch, tokens, heads):
            raise ValueError(
                f"{operation}: got keys {tuple(k_BTGK.shape)} and {name} {tuple(tensor.shape)} for "
                f"values {tuple(v_BTHV.shape)}, expected the values' rows and tokens, and one "
                "number a head; give tensors of the same tokens"
            )


def check_state(
    operation: str,
    state: Tensor | Sequence[Tensor] | None,
    expected: tuple[int, ...] | list[tuple[int, ...]],
    doc_ids_BT: Tensor | None,
) -> None:
    """ValueError for an initial state of other shapes, or together with documents."""
    if state is None:
        return
    if doc_ids_BT is not None:
        raise ValueError(
            f"{operation}: got an initial state together with documents, expected one of them; a "
            "state belongs to rows of one document"
        )
    got = tuple(state.shape) if isinstance(state, Tensor) else [tuple(z.shape) for z in state]
    if got != expected:
        raise ValueError(
            f"{operation}: got an initial state {got}, expected {expected}; give the state of "
            "these heads and widths"
        )
