"""How many tokens a judge reads and writes for each conversation of a call.

Who wants to know opens a `metering` context around the call; a judge that counts adds to the meter
that it finds there. A judge that does not count leaves the numbers unknown, not zero.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCount:
    """Tokens that went through a model for one conversation."""

    read: int
    """Given to the model, those that stand for frames included; what it kept from an earlier call
    and did not read again is not counted."""
    written: int
    """Chosen by the model, the one that ends a turn included."""


class TokenMeter:
    """Counts for the conversations of one call; judges add from any thread.

    Args:
        count: Conversations of the call.
    """

    def __init__(self, count: int) -> None:
        self._counts: list[TokenCount | None] = [None] * count
        self._lost: set[int] = set()
        self._lock = threading.Lock()

    def add(self, row: int, *, read: int, written: int) -> None:
        """Add what a part of the call cost for one conversation."""
        with self._lock:
            was = self._counts[row] or TokenCount(0, 0)
            self._counts[row] = TokenCount(was.read + read, was.written + written)

    def lose(self, row: int) -> None:
        """Note that a part of the call cost something that nobody counted."""
        with self._lock:
            self._lost.add(row)

    def of(self, row: int) -> TokenCount | None:
        """What the call cost for one conversation; None where that is not known."""
        return None if row in self._lost else self._counts[row]


_METER: ContextVar[TokenMeter | None] = ContextVar("token meter", default=None)


@contextmanager
def metering(count: int) -> Iterator[TokenMeter]:
    """Count the tokens of the one call to a judge inside this context.

    Args:
        count: Conversations of the call.
    """
    meter = TokenMeter(count)
    before = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(before)


def current_meter(count: int) -> TokenMeter:
    """The meter of the call under way; one that nobody reads where there is none."""
    meter = _METER.get()
    return TokenMeter(count) if meter is None else meter
