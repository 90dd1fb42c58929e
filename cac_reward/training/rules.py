"""Rules that values of settings keep, each refused by its key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException


def near_name(name: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name: the known one that is like it, if there is one."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_shares(name: str, shares: Mapping[str, float], known: Iterable[str]) -> None:
    """Shares of known things, at least one of them above 0.

    Raises:
        ValueError: If they are not, with the key.
    """
    names = list(known)
    for key, value in shares.items():
        if key not in names:
            hint = near_name(key, names)
            raise ValueError(f"{name} must name some of {', '.join(names)}, got {key!r}{hint}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}.{key} must be at least 0, got {value}")
    if not sum(shares.values()) > 0:
        raise ValueError(f"{name} must have at least one with a share above 0, got {shares}")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless a value is one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def at_least(name: str, value: float, least: int) -> None:
    """Raises ValueError unless a number is finite and not below `least`."""
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def above_zero(name: str, value: float) -> None:
    """Raises ValueError unless a number is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0, got {value}")


def within(name: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """Raises ValueError unless low <= value < high; where closed, high is allowed too."""
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{name} must be in [{low}, {high}{']' if closed else ')'}, got {value}")


def unknown_key(error: ConfigKeyError) -> str:
    """What to say of a key that no settings have."""
    kind = error.object_type
    known = list(getattr(kind, "__dataclass_fields__", {}))
    near = get_close_matches(str(error.key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"{error.full_key} must be a known key, got none of that name; {hint}"


def wrong_value(error: OmegaConfBaseException) -> str:
    """What to say of a value that is missing or of another type."""
    key = error.full_key or "config"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} must be given, got nothing"
    said = str(error).splitlines()[0]
    return f"{key} must be a list, as [A, B]" if "is not a ListConfig" in said else f"{key}: {said}"
