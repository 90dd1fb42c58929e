"""What is kept of each clip of a large batch: its file, its size and the report, a line each.

A file of records (JSONL) is written line by line, so that a kill loses at most the line being
written; reading it again skips such a torn end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from types import TracebackType
from typing import Protocol

from cac_reward.plain import read_json
from cac_reward.report import AnomalyReport
from cac_reward.video import Video, VideoHeader

logger = logging.getLogger(__name__)

_KEYS = ("path", "width", "height", "error", "report")


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One file: judged, or with the reason why it could not be read."""

    path: str
    """Of the file, as it was given; relative to the working directory or absolute."""
    width: int | None = None
    """Pixels; None where the file could not be read."""
    height: int | None = None
    """Pixels; None where the file could not be read."""
    report: AnomalyReport | None = None
    """None where the file could not be read."""
    error: str | None = None
    """Why the file could not be read; None where it was."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"path must name a file, got {self.path!r}")
        if (self.report is None) == (self.error is None):
            raise ValueError(
                f"record of {self.path} must hold a report or an error, got "
                f"{'neither' if self.report is None else 'both'}"
            )
        for name in ("width", "height"):
            value = getattr(self, name)
            pixels = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if pixels != (self.report is not None) or not (pixels or value is None):
                raise ValueError(
                    f"{name} of {self.path} must be a number of pixels exactly where there is a "
                    f"report, got {value!r}"
                )

    @property
    def failure(self) -> str | None:
        """Why there is no score, whatever the reason; None where there is one."""
        return self.error if self.report is None else self.report.error

    def decode(self, *, longest_side: int | None = None) -> Video:
        """The clip's frames again, as they were judged.

        Args:
            longest_side: Pixels to which larger frames are shrunk; None keeps their size.

        Raises:
            FileNotFoundError: If the file is gone.
            ValueError: If there is no report, or the file is not the one that was judged.
        """
        if self.report is None:
            raise ValueError(f"clip must have been readable to be shown, got {self.path}")
        header = VideoHeader.read(self.path)
        fps = None if header.fps == self.report.fps else self.report.fps
        video = Video.decode(self.path, fps=fps, longest_side=longest_side)
        was = (self.report.num_frames, self.height, self.width)
        if (video.num_frames, header.height, header.width) != was:
            raise ValueError(
                f"clip must still have its {was[0]} frames of {was[2]}x{was[1]}, got "
                f"{video.num_frames} of {header.width}x{header.height} in {self.path}; judge it "
                "again"
            )
        return video

    def to_json(self) -> str:
        """One line without its end."""
        plain = {name: getattr(self, name) for name in _KEYS[:-1]}
        plain["report"] = None if self.report is None else self.report.to_dict()
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> ClipRecord:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the line is not JSON or no record.
        """
        plain = read_json("record", line)
        if not isinstance(plain, Mapping) or sorted(plain) != sorted(_KEYS):
            got = short(sorted(plain)) if isinstance(plain, Mapping) else type(plain).__name__
            raise ValueError(f"record must be an object with the keys {list(_KEYS)}, got {got}")
        report = plain["report"]
        return cls(
            **{name: plain[name] for name in _KEYS[:-1]},
            report=None if report is None else AnomalyReport.from_dict(report),
        )


def read_records(path: str | os.PathLike[str]) -> dict[str, ClipRecord]:
    """Read a file of records, by the path of their clip; the last line on a clip counts.

    Args:
        path: what `RecordWriter` wrote, or several such files one behind the other.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a whole line is no record, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"records must be an existing file, got {path}")
    records: dict[str, ClipRecord] = {}
    with path.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.endswith(b"\n"):
                logger.warning("%s: line %d was cut off in writing and is left out", path, number)
                break
            try:
                record = ClipRecord.from_json(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path} must hold one record per line, got in line {number}: {error}"
                ) from error
            records[record.path] = record
    return records


class Line(Protocol):
    """What fits on a line of its own, for example a `ClipRecord`."""

    def to_json(self) -> str: ...


class RecordWriter:
    """Adds records to a file, each as one whole line on the disk; used as a context.

    Args:
        path: of the file; made if missing. A torn last line is cut away.

    Raises:
        ValueError: Another process is writing to the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"output must be written by one process, got {self.path}, which another one is "
                "writing; name another file, for example one for each shard"
            ) from error
        self._cut_torn_line()

    def write(self, record: Line) -> None:
        """Add a line; it is on the disk when this returns."""
        self._file.write(record.to_json().encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _cut_torn_line(self) -> None:
        """Go back to the end of the last whole line."""
        end = size = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
