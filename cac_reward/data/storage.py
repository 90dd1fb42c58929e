"""Annotation files of every kind, told apart by their suffix, one clip in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cac_reward.data.annotations import (
    AnnotatedClip,
    SchemaError,
    conversion_hint,
    upgrade,
)
from cac_reward.data.lines import line_writer, parse_record, read_lines
from cac_reward.data.shards import ShardLimits, read_shard, shard_writer

SUFFIXES = (".jsonl", ".parquet", ".tar")


@dataclass(frozen=True)
class Record:
    """What stands at one place of an annotation file, whether or not it is a clip."""

    place: str
    """For example 'line 3', 'row 3' or 'sample 000000002'."""
    plain: object = None
    """Plain JSON values."""
    fault: str | None = None
    """Why it could not be read as such; None where it could."""


def annotation_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder in the order of their names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is another one, or a folder holds files of several kinds or none.
    """
    if not path.exists():
        raise FileNotFoundError(f"annotations must be an existing file or folder, got {path}")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"annotations must end in one of {', '.join(SUFFIXES)}, got {path}")
        return [path]
    found = sorted(one for one in path.iterdir() if one.suffix in SUFFIXES)
    kinds = sorted({one.suffix for one in found})
    if len(kinds) != 1:
        raise ValueError(
            f"folder of annotations must hold files of one kind, {', '.join(SUFFIXES)}, got "
            f"{' and '.join(kinds) or 'none'} in {path}"
        )
    return found


def iterate_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Everything in an annotation file, or in the files of one kind in a folder, in their order.

    Args:
        path: `.jsonl`, `.parquet`, `.tar`, or a folder of such files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is another one, or the file is broken as a whole.
    """
    path = Path(path)
    for file in annotation_files(path):
        prefix = f"{file.name} " if path.is_dir() else ""
        for place, load in _entries(file):
            try:
                yield Record(prefix + place, load())
            except ValueError as error:
                yield Record(prefix + place, fault=str(error))


def read_annotations(path: str | os.PathLike[str]) -> Iterator[AnnotatedClip]:
    """The clips of an annotation file.

    Args:
        path: `.jsonl`, `.parquet`, `.tar`, or a folder of such files.

    Raises:
        FileNotFoundError: If there is no such file.
        SchemaError: If a clip is of another schema version; the message has the command that
            converts the file.
        ValueError: If something is no clip, with its place.
    """
    for _, clip in _clips(path, AnnotatedClip.from_dict):
        yield clip


def upgraded_annotations(path: str | os.PathLike[str]) -> Iterator[AnnotatedClip]:
    """The clips of an annotation file of this or any older schema version.

    Raises:
        FileNotFoundError: If there is no such file.
        SchemaError: If a clip is of a newer version.
        ValueError: If something is no clip, with its place.
    """
    for _, clip in _clips(path, upgrade):
        yield clip


def annotation_writer(
    path: str | os.PathLike[str],
    *,
    videos: Path | None = None,
    limits: ShardLimits = ShardLimits(),
) -> AbstractContextManager[Callable[[AnnotatedClip], None]]:
    """A context that gives a function to write clips with.

    Args:
        path: `.jsonl` or `.parquet`: one file, whole or not at all. `.tar`: a series of shards,
            see `shard_writer`.
        videos: Root of the clips' paths, to pack the videos into shards.
        limits: When a shard is full.

    Raises:
        ValueError: If the suffix is another one, or videos are to go elsewhere than into shards.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"output must end in one of {', '.join(SUFFIXES)}, got {path}")
    if suffix == ".tar":
        return shard_writer(path, videos, limits)
    if videos is not None:
        raise ValueError(f"videos must be packed into .tar, got {path}")
    if suffix == ".parquet":
        from cac_reward.data.parquet import parquet_writer

        return parquet_writer(path)
    return line_writer(path)


def refusal(error: SchemaError, path: str | os.PathLike[str], place: str) -> SchemaError:
    """The error with the place and with the command that converts the file."""
    return SchemaError(
        error.version, f"{path}: {place}", conversion_hint(error.version, os.fspath(path))
    )


def _clips(
    path: str | os.PathLike[str], read: Callable[[object], AnnotatedClip]
) -> Iterator[tuple[str, AnnotatedClip]]:
    for record in iterate_records(path):
        if record.fault is not None:
            raise ValueError(f"{path}: {record.place}: {record.fault}")
        try:
            clip = read(record.plain)
        except SchemaError as error:
            raise refusal(error, path, record.place) from error
        except ValueError as error:
            raise ValueError(f"{path}: {record.place}: {error}") from error
        yield record.place, clip


def _entries(file: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Place of each entry and what reads it as plain values."""
    if file.suffix == ".jsonl":
        for place, line in read_lines(file):
            yield place, lambda line=line: parse_record(line)  # type: ignore[misc]
    elif file.suffix == ".tar":
        for sample in read_shard(file, {"json"}):
            yield f"sample {sample.key}", sample.annotation
    else:
        from cac_reward.data.parquet import from_row, read_parquet

        for place, row in read_parquet(file):
            yield place, lambda row=row: from_row(row)  # type: ignore[misc]
