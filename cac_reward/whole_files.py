"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Write a file that gets its name only when everything is in it and on the disk.

    Inside the context the file is called `path` with `.partial` behind it; leaving by an error
    deletes it and lets an older file of that name be.

    Args:
        path: Where it is to be.
        mode: 'w' (UTF-8) or 'wb'.
        **options: More arguments of `open`, for example `newline`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole_file(folder / "scores.txt") as opened:
        ...     _ = opened.write("0.5")
        >>> [path.name for path in folder.iterdir()]
        ['scores.txt']
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    encoding = None if "b" in mode else "utf-8"
    try:
        with partial.open(mode, encoding=encoding, **options) as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
