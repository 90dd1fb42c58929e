"""Annotated clips by number: found without being held, read when their turn comes.

A clip that cannot be read is not the end of a run: another takes its place, it is counted, and too
many of them are.
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_reward.data.annotations import AnnotatedClip, SchemaError
from cac_reward.data.lines import parse_record
from cac_reward.data.storage import refusal
from cac_reward.video import Video

SUFFIXES = (".jsonl", ".parquet", ".tar")


@dataclass(frozen=True)
class Skipped:
    """A clip that could not be read."""

    name: str
    reason: str


class ClipStore:
    """The clips of annotation files, in their order.

    Only where each clip's line begins is kept in memory: 8 bytes for each. Parquet files are read
    a row group at a time, shards by the places of their members.

    Args:
        files: `.jsonl`, `.parquet`, `.tar` (not compressed), or folders of one kind of them.
        videos: root of the clips' paths; None takes each file's folder.
        split: only clips of this split; None takes all.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken or holds something that is no clip, with its place.
    """

    def __init__(
        self, files: Sequence[str | Path], *, videos: str | Path | None = None, split: str | None
    ) -> None:
        self.videos = None if videos is None else Path(videos)
        self.files = [found for one in files for found in _files(Path(one))]
        self._which = array("I")
        self._where = array("Q")
        self._readers = [_open(file) for file in self.files]
        for number, reader in enumerate(self._readers):
            for where in reader.places():
                if split is None or reader.annotation(where).split == split:
                    self._which.append(number)
                    self._where.append(where)

    def __len__(self) -> int:
        return len(self._which)

    def annotation(self, number: int) -> AnnotatedClip:
        """What is known of a clip.

        Raises:
            ValueError: If the line is no clip, with its place.
        """
        return self._readers[self._which[number]].annotation(self._where[number])

    def video(self, number: int, clip: AnnotatedClip) -> Video:
        """The decoded clip.

        Raises:
            FileNotFoundError, ValueError: If it is missing or unreadable.
        """
        reader = self._readers[self._which[number]]
        packed = reader.video(self._where[number])
        if packed is not None:
            return Video.decode(io.BytesIO(packed), fps=clip.fps)
        root = self.videos or self.files[self._which[number]].parent
        return Video.decode(root / clip.path, fps=clip.fps)


class _Lines:
    """A `.jsonl`: places are offsets of lines."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def places(self) -> list[int]:
        found: list[int] = []
        at = 0
        with self.file.open("rb") as opened:
            for line in opened:
                if line.strip():
                    found.append(at)
                at += len(line)
        return found

    def annotation(self, where: int) -> AnnotatedClip:
        with self.file.open("rb") as opened:
            opened.seek(where)
            return _read(opened.readline(), self.file, f"byte {where}")

    def video(self, where: int) -> bytes | None:
        return None


class _Shard:
    """A `.tar` that `annotate convert` wrote: places are those of the annotations' members."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._videos: dict[int, tuple[int, int]] = {}

    def places(self) -> list[int]:
        found: list[tuple[int, int]] = []
        last: dict[str, int] = {}
        with tarfile.open(self.file, "r:") as shard:
            for member in shard:
                stem, _, suffix = member.name.partition(".")
                if suffix == "json":
                    found.append((member.offset_data, member.size))
                    last = {stem: member.offset_data}
                elif stem in last:
                    self._videos[last[stem]] = (member.offset_data, member.size)
        self._sizes = dict(found)
        return [offset for offset, _ in found]

    def annotation(self, where: int) -> AnnotatedClip:
        return _read(self._bytes(where, self._sizes[where]), self.file, f"byte {where}")

    def video(self, where: int) -> bytes | None:
        if where not in self._videos:
            return None
        return self._bytes(*self._videos[where])

    def _bytes(self, offset: int, size: int) -> bytes:
        with self.file.open("rb") as opened:
            opened.seek(offset)
            return opened.read(size)


class _Table:
    """A `.parquet`: places are rows; one row group is in memory at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._group: tuple[int, list[dict[str, object]]] = (-1, [])
        self._starts: list[int] = []

    def places(self) -> range:
        import pyarrow.parquet

        meta = pyarrow.parquet.ParquetFile(self.file).metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return range(meta.num_rows)

    def annotation(self, where: int) -> AnnotatedClip:
        import pyarrow.parquet

        from cac_reward.data.parquet import from_row

        group = int(np.searchsorted(self._starts, where, side="right")) - 1
        if self._group[0] != group:
            table = pyarrow.parquet.ParquetFile(self.file).read_row_group(group)
            self._group = (group, table.to_pylist())
        row = self._group[1][where - self._starts[group]]
        return _clip(from_row(row), self.file, f"row {where + 1}")

    def video(self, where: int) -> bytes | None:
        return None


def _open(file: Path) -> _Lines | _Shard | _Table:
    if file.suffix == ".tar":
        return _Shard(file)
    return _Lines(file) if file.suffix == ".jsonl" else _Table(file)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"annotations must be an existing file or folder, got {path}")
    found = (
        sorted(one for one in path.iterdir() if one.suffix in SUFFIXES) if path.is_dir() else [path]
    )
    if not found or any(one.suffix not in SUFFIXES for one in found):
        raise ValueError(f"annotations must end in one of {', '.join(SUFFIXES)}, got {path}")
    return found


def _read(line: bytes, file: Path, place: str) -> AnnotatedClip:
    try:
        plain = parse_record(line)
    except ValueError as error:
        raise ValueError(f"{file}: {place}: {error}") from error
    return _clip(plain, file, place)


def _clip(plain: object, file: Path, place: str) -> AnnotatedClip:
    try:
        return AnnotatedClip.from_dict(plain)
    except SchemaError as error:
        raise refusal(error, file, place) from error
    except ValueError as error:
        raise ValueError(f"{file}: {place}: {error}") from error
