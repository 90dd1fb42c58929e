"""Annotations as lines of JSON: read and written one at a time, whatever their number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.whole_files import whole_file


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """Place ("line 3") and content of every line of a file."""
    with Path(path).open("rb") as opened:
        for number, line in enumerate(opened, 1):
            yield f"line {number}", line


def parse_record(text: bytes) -> object:
    """A line as plain JSON values.

    Raises:
        ValueError: If it is empty or not JSON, with the column.
    """
    if not text.strip():
        raise ValueError("line must hold a clip, got an empty one")
    try:
        return json.loads(text.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"clip must be JSON, got {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("clip must be JSON of a few levels, got too many") from error


def write_record(clip: AnnotatedClip) -> str:
    """A clip as one line without its end."""
    return json.dumps(clip.to_dict(), ensure_ascii=False, allow_nan=False)


@contextmanager
def line_writer(path: str | os.PathLike[str]) -> Iterator[Callable[[AnnotatedClip], None]]:
    """What adds a clip to a file, which appears when the context is left without an error."""
    with whole_file(path, newline="\n") as opened:

        def write(clip: AnnotatedClip) -> None:
            opened.write(write_record(clip) + "\n")

        yield write
