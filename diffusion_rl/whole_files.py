"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write a file that gets its name only when everything is in it and on the disk.

    Where that fails, what had the name before stays.

    Args:
        path: of the file; its folder is made if missing.
        content: text is written as UTF-8.

    Returns:
        The path.

    Raises:
        OSError: the disk is full, or does not let it be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
