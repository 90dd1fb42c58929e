"""One writer for a run's folder: the second process that wants to train there is refused.

The lock is the kernel's, on the file `run.lock`, so that it ends with the process that holds it,
however that ends; what the file says is for people, and for disks whose locks other hosts do not
see.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
_held: dict[Path, IO[str]] = {}


def take_lock(folder: str | Path) -> None:
    """Be the only process that writes to `folder`, until `release_lock` or the process's end.

    A process that holds the lock already keeps it.

    Args:
        folder: made if missing.

    Raises:
        ValueError: another process writes there, or one on another host has not said that it
            ended, or the file system has no locks.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    if folder in _held and _is(_held[folder], path):
        return
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(file)
        file.close()
        raise ValueError(
            f"output must be a folder that no other process writes to, got {folder}, where "
            f"{holder.get('name', 'another process')} is training; wait for it, stop it, or choose "
            "another output"
        ) from error
    except OSError as error:
        file.close()
        raise ValueError(
            f"output must be on a file system with locks, got {folder}: {error.strerror}; mount it "
            "with them (Lustre: -o flock), or choose another output"
        ) from error
    if not _is(file, path):  # Its holder took the file away between the two lines above.
        file.close()
        return take_lock(folder)
    holder = _holder(file)
    if holder.get("host", socket.gethostname()) != socket.gethostname():
        file.close()
        raise ValueError(
            f"output must be a folder that no other process writes to, got {folder}, where "
            f"{holder['name']} was training, and whether it still is cannot be seen from here; "
            f"if it has ended, delete {path}"
        )
    if holder:
        logger.info("%s ended without giving %s free; it is taken over", holder["name"], folder)
    host, pid = socket.gethostname(), os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    name = f"process {pid} on {host} (since {since})"
    file.truncate(0)
    file.write(json.dumps({"pid": pid, "host": host, "name": name}))
    file.flush()
    _held[folder] = file


def release_lock(folder: str | Path) -> None:
    """Let others write to `folder`; nothing happens where this process holds no lock."""
    file = _held.pop(Path(folder).resolve(), None)
    if file is None:
        return
    path = Path(file.name)
    if _is(file, path):
        path.unlink()
    file.close()


def _is(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _holder(file: IO[str]) -> dict[str, str]:
    """What a lock file says; nothing of one that was cut off."""
    file.seek(0)
    try:
        return dict(json.loads(file.read() or "{}"))
    except json.JSONDecodeError:
        return {}


def _forget() -> None:
    """A forked child holds no lock: else its parent's would outlive the parent."""
    for file in _held.values():
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
