"""Reports kept by the content of what was judged, over restarts and between processes.

A report is found again only if pixels, rate, prompt, judge and settings are all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cac_reward.report import AnomalyReport

VERSION = 1
WAIT_SECONDS = 60.0
_SETUP = "CREATE TABLE IF NOT EXISTS reports (key TEXT PRIMARY KEY, report TEXT NOT NULL)"


class ReportCache:
    """A file of reports that many threads and processes may read and write at once.

    It is an SQLite database: a write is whole or not there at all, a kill loses at most the
    report being written, and writers wait for each other. Reports with an error are not kept,
    since another try may succeed.

    Args:
        path: of the file; it and its folder are made if missing.

    Raises:
        ValueError: The file is no cache of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.hits = 0
        self.misses = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._opened() as connection:
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
                if version != VERSION and tables:
                    raise ValueError(
                        f"cache must be of version {VERSION}, got {version} in {self.path}; "
                        "delete it or name another file"
                    )
                connection.execute(_SETUP)
                connection.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"cache must be a file written by this class, got {self.path} ({error}); "
                "delete it or name another file"
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation, committed at the end; none may cross threads."""
        with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as connection, connection:
            yield connection

    def get(self, key: str) -> AnomalyReport | None:
        """The report kept under a key of `report_key`, or None."""
        with self._opened() as connection:
            row = connection.execute("SELECT report FROM reports WHERE key = ?", (key,)).fetchone()
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        return AnomalyReport.from_json(row[0])

    def put(self, reports: Mapping[str, AnomalyReport]) -> None:
        """Keep reports by their keys; the first one kept under a key stays."""
        rows = [(key, one.to_json()) for key, one in reports.items() if one.error is None]
        with self._opened() as connection:
            connection.executemany("INSERT OR IGNORE INTO reports VALUES (?, ?)", rows)

    def __len__(self) -> int:
        with self._opened() as connection:
            return connection.execute("SELECT COUNT(*) FROM reports").fetchone()[0]


def report_key(frames: Tensor, fps: float, prompt: str, asked: Mapping[str, object]) -> str:
    """Name everything a report depends on, as a SHA-256 in hexadecimal.

    Args:
        frames: [F 3 H W]; the same picture as uint8 and as float counts as two.
        fps: frames per second.
        prompt: what the clip was generated from.
        asked: judge, its files and all settings, as JSON has them.
    """
    described = [VERSION, str(frames.dtype), list(frames.shape), float(fps), prompt, dict(asked)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(frames.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
