"""Annotated clips by number: found without being held, read when their turn comes.

A clip that cannot be read is not the end of a run: another takes its place, it is counted, and too
many of them are.
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cac_reward.data.annotations import AnnotatedClip, SchemaError
from cac_reward.data.lines import parse_record
from cac_reward.data.storage import annotation_files, refusal
from cac_reward.data.videos import open_video
from cac_reward.video import Video


@dataclass(frozen=True)
class Skipped:
    """A clip that could not be read."""

    name: str
    reason: str


class ClipStore:
    """The clips of annotation files, in their order.

    Only where each clip stands is kept in memory: 12 bytes for each. Parquet files are read a row
    group at a time, shards by the places of their members.

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
        self.files = [found for one in files for found in annotation_files(Path(one))]
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
        return open_video(clip, root)


class _Lines:
    """A `.jsonl`: places are offsets of lines."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def places(self) -> Iterator[int]:
        at = 0
        with self.file.open("rb") as opened:
            for line in opened:
                if line.strip():
                    yield at
                at += len(line)

    def annotation(self, where: int) -> AnnotatedClip:
        with self.file.open("rb") as opened:
            opened.seek(where)
            line = opened.readline()
        return _clip(lambda: parse_record(line), self.file, lambda: f"line {self._number(where)}")

    def _number(self, where: int) -> int:
        """Of the line at a place, from 1; for messages, since it reads all before it."""
        with self.file.open("rb") as opened:
            before = 0
            for number, line in enumerate(opened, 1):
                if before >= where:
                    return number
                before += len(line)
        raise AssertionError(f"{self.file} has no byte {where}")

    def video(self, where: int) -> bytes | None:
        return None


class _Shard:
    """A `.tar` that `annotate convert` wrote: places are those of the annotations' members.

    The video of a clip, where it is packed, is the member behind the annotation with its name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def places(self) -> Iterator[int]:
        try:
            with tarfile.open(self.file, "r:") as shard:
                while (member := shard.next()) is not None:
                    if member.isfile() and _split(member)[1] == "json":
                        yield member.offset
                    shard.members = []  # type: ignore[attr-defined] # It would keep all it has read.
                # Where tarfile meets half a header it stops without a word.
                if self.file.stat().st_size < shard.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end-of-archive block")
        except tarfile.TarError as error:
            raise ValueError(
                f"{self.file} must be a whole tar file, not compressed, got one that is not: "
                f"{error}"
            ) from error

    def annotation(self, where: int) -> AnnotatedClip:
        with self._opened(where) as shard:
            member = shard.next()
            assert member is not None
            content = _content(shard, member)
        place = f"sample {_split(member)[0]}"
        return _clip(lambda: parse_record(content), self.file, lambda: place)

    def video(self, where: int) -> bytes | None:
        with self._opened(where) as shard:
            annotation, beside = shard.next(), shard.next()
            assert annotation is not None
            if beside is None or _split(beside)[0] != _split(annotation)[0]:
                return None
            return _content(shard, beside)

    @contextmanager
    def _opened(self, where: int) -> Iterator[tarfile.TarFile]:
        """The shard from a member on."""
        with self.file.open("rb") as opened:
            opened.seek(where)
            with tarfile.open(fileobj=opened, mode="r:") as shard:
                yield shard


class _Table:
    """A `.parquet`: places are rows; one row group is in memory at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._group: tuple[int, Any] = (-1, None)
        self._starts = np.zeros(0, np.int64)

    def places(self) -> range:
        meta = self._opened().metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        return range(meta.num_rows)

    def annotation(self, where: int) -> AnnotatedClip:
        from cac_reward.data.parquet import from_row

        group = int(np.searchsorted(self._starts, where, side="right")) - 1
        if self._group[0] != group:
            self._group = (group, self._opened().read_row_group(group))
        (row,) = self._group[1].slice(where - self._starts[group], 1).to_pylist()
        return _clip(lambda: from_row(row), self.file, lambda: f"row {where + 1}")

    def video(self, where: int) -> bytes | None:
        return None

    def _opened(self) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{self.file} must be a parquet file, got one of another kind"
            ) from error


def _open(file: Path) -> _Lines | _Shard | _Table:
    if file.suffix == ".tar":
        return _Shard(file)
    return _Lines(file) if file.suffix == ".jsonl" else _Table(file)


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Name of a member's sample and what it is of it: all behind the first dot of the last part."""
    folder, _, last = member.name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}", suffix


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = shard.extractfile(member)
    if opened is None:
        raise ValueError(f"shard must hold plain files, got {member.name!r}, which is not one")
    return opened.read()


def _clip(plain: Callable[[], object], file: Path, place: Callable[[], str]) -> AnnotatedClip:
    """A clip from what reads its plain values; `place` names where, should something be wrong."""
    try:
        return AnnotatedClip.from_dict(plain())
    except SchemaError as error:
        raise refusal(error, file, place()) from error
    except ValueError as error:
        raise ValueError(f"{file}: {place()}: {error}") from error
