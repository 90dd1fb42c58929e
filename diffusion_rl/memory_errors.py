"""One error for memory that ran out, on a GPU or on the CPU, which says what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

GIGABYTE = 1e9
NAMED = 3
"""Settings that the message names."""
PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says of it where it has no error of its own."""
NO_SETTING = "no setting is known to help: it takes a smaller model, or more memory"


class Saving(NamedTuple):
    """A setting that would need less memory."""

    setting: str
    """As in a config, with what it would be."""
    bytes: float
    """About what it saves."""


class OutOfMemoryError(RuntimeError):
    """Memory ran out; the message says what to change."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the computer."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # A class of somebody else's, a server's error for one, may speak of memory elsewhere.
    own = type(error).__module__.partition(".")[0] in ("builtins", "torch")
    return own and any(phrase in str(error).lower() for phrase in PHRASES)


@contextmanager
def explain_out_of_memory(doing: str, savings: Callable[[], Sequence[Saving]]) -> Iterator[None]:
    """Say what to change if memory runs out in here, on a GPU or on the CPU.

    Args:
        doing: what is done in here, as it stands in the message.
        savings: the settings that would help, unsorted; asked when memory has run out.

    Raises:
        OutOfMemoryError: memory ran out; one that is explained already passes as it is.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        found = sorted(savings(), key=lambda one: -one.bytes)
        named = [f"{one.setting} saves about {one.bytes / GIGABYTE:.2g} GB" for one in found]
        advice = "; ".join(named[:NAMED]) or NO_SETTING
        raise OutOfMemoryError(f"memory ran out in {doing} ({error}); {advice}") from error
