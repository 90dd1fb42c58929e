"""Annotations with their videos in webdataset shards: tar files that are read front to back.

Each sample is `KEY.json`, the annotation as it was, and next to it the video as `KEY.mp4` (or
whatever its suffix is), where videos were packed.

Source: the convention of https://github.com/webdataset/webdataset: members of one sample follow
each other and share everything up to the first dot of their last part.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.lines import parse_record, write_record
from cac_reward.whole_files import whole_file

MAX_MEMBER_BYTES = 4 * 1024**3
"""Largest file of a shard that is read."""


@dataclass(frozen=True, kw_only=True)
class ShardLimits:
    """When a shard is full."""

    max_clips: int = 1000
    """Most clips of a shard, at least 1."""
    max_bytes: int = 1024**3
    """Bytes of videos after which no other clip is added, at least 1."""

    def __post_init__(self) -> None:
        for name in ("max_clips", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ShardSample:
    """One sample of a shard, as its bytes."""

    key: str
    """Name without suffix, for example '000000012'."""
    members: Mapping[str, bytes]
    """By suffix without the first dot, for example 'json' and 'mp4'."""

    def annotation(self) -> object:
        """Plain values of the annotation.

        Raises:
            ValueError: If there is none or it is not JSON.
        """
        if "json" not in self.members:
            raise ValueError(f"sample must have {self.key}.json, got {sorted(self.members)}")
        return parse_record(self.members["json"])


def read_shard(
    path: str | os.PathLike[str], suffixes: set[str] | None = None
) -> Iterator[ShardSample]:
    """Every sample of a shard, front to back, one in memory at a time.

    Args:
        path: Of a tar file, compressed or not.
        suffixes: What to keep of a sample, for example {'json'}; None for everything.

    Raises:
        ValueError: If it is no whole tar file, holds other things than files and folders, or a
            file is larger than `MAX_MEMBER_BYTES`.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    for shard, member, own, suffix in _members(path):
        if own != key and key is not None:
            yield ShardSample(key, members)
        if own != key:
            key, members = own, {}
        _check_member(member, suffix in members, path)
        if suffixes is None or suffix in suffixes:
            with _refused(path):
                content = shard.extractfile(member)
                assert content is not None
                members[suffix] = content.read()
    if key is not None:
        yield ShardSample(key, members)


def shard_places(path: str | os.PathLike[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Where the members of each sample stand in a tar file that is not compressed.

    Returns:
        Begin and length in bytes by suffix, by key.

    Raises:
        ValueError: As `read_shard`.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for _, member, key, suffix in _members(path):
        own = found.setdefault(key, {})
        _check_member(member, suffix in own, path)
        own[suffix] = (member.offset_data, member.size)
    return found


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a shard can only be read from the front."""
    try:
        with tarfile.open(path, "r:"):
            return False
    except tarfile.ReadError:
        return True


Member = tuple[tarfile.TarFile, tarfile.TarInfo, str, str]
"""The open shard, a member of it, and the member's key and suffix."""


def _members(path: str | os.PathLike[str]) -> Iterator[Member]:
    """Every member that is no folder; a file that is no whole shard is refused at its end."""
    with _refused(path), tarfile.open(path, "r|*") as shard:
        for member in shard:
            if not member.isdir():
                yield shard, member, *_split(member.name)
        # Where tarfile meets half a header, or none, it stops without a word.
        assert shard.fileobj is not None
        if shard.fileobj.tell() < shard.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no end-of-archive block")


@contextmanager
def _refused(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole tar file, got one that is not: {error}"
        ) from error


@contextmanager
def shard_writer(
    path: str | os.PathLike[str],
    videos: Path | None = None,
    limits: ShardLimits = ShardLimits(),
) -> Iterator[Callable[[AnnotatedClip], None]]:
    """What adds a clip to a series of shards, each of which appears when it is full.

    Shards that are there already are taken as written by the same call before: the clips in them
    are skipped, so that a run that was stopped goes on.

    Args:
        path: 'clips.tar' for clips-000000.tar, clips-000001.tar and so on.
        videos: Root of the clips' paths, to pack the files too; None for annotations only.
        limits: When a shard is full.

    Raises:
        FileNotFoundError: If a video is missing.
        ValueError: If what is there was made of other clips, or a clip is no single file.
    """
    with ExitStack() as stack:
        series = _Series(Path(path), videos, limits, stack)
        yield series.write
        series.finish()


class _Series:
    """Shards one after the other."""

    def __init__(
        self, path: Path, videos: Path | None, limits: ShardLimits, stack: ExitStack
    ) -> None:
        self.path, self.videos, self.limits = path, videos, limits
        self.number = self.shard_number = 0
        self.old = self._old()
        self.stack = stack
        """Holds the open shard: closed well it gets its name, left by an error it is dropped."""
        self.tar: tarfile.TarFile | None = None

    def write(self, clip: AnnotatedClip) -> None:
        old = next(self.old, None)
        if old is not None:
            name, line = old
            if line != write_record(clip).encode("utf-8"):
                raise ValueError(
                    f"{name} must hold clip {self.number + 1} of this run to go on behind it, got "
                    "another; delete the shards or name others"
                )
            self.number += 1
            return
        if self.tar is None:
            self._open()
        key = f"{self.number:09}"
        line = write_record(clip).encode("utf-8")
        self._add(f"{key}.json", io.BytesIO(line), len(line))
        if self.videos is not None:
            self._add_video(key, clip)
        self.number += 1
        self.clips += 1
        if self.clips >= self.limits.max_clips or self.bytes >= self.limits.max_bytes:
            self.stack.close()
            self.tar = None

    def finish(self) -> None:
        if next(self.old, None) is not None:
            raise ValueError(
                f"shards must hold no more clips than this run has, {self.number}, got more in "
                f"{self._shard(self.shard_number - 1)}; delete the shards or name others"
            )

    def _shard(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{number:06}{self.path.suffix}")

    def _old(self) -> Iterator[tuple[str, bytes]]:
        """Name of the shard and annotation of each clip that is written already."""
        while self._shard(self.shard_number).exists():
            shard = self._shard(self.shard_number)
            self.shard_number += 1
            for sample in read_shard(shard, {"json"}):
                yield shard.name, sample.members["json"]

    def _open(self) -> None:
        opened = self.stack.enter_context(whole_file(self._shard(self.shard_number), "wb"))
        tar = tarfile.open(fileobj=opened, mode="w|")  # noqa: SIM115, the stack closes it.
        self.tar = self.stack.enter_context(tar)
        self.shard_number += 1
        self.clips = self.bytes = 0

    def _add(self, name: str, content: IO[bytes], size: int) -> None:
        # No time and no owner: the same clips make the same bytes.
        member = tarfile.TarInfo(name)
        member.size = size
        assert self.tar is not None
        self.tar.addfile(member, content)

    def _add_video(self, key: str, clip: AnnotatedClip) -> None:
        assert self.videos is not None
        place = self.videos / clip.path
        if clip.key is not None or place.is_dir():
            raise ValueError(f"clip must be a video file to be packed, got {clip.name}")
        if not place.is_file():
            raise FileNotFoundError(f"video must be an existing file to be packed, got {place}")
        with place.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            self._add(f"{key}{place.suffix.lower() or '.video'}", opened, size)
        self.bytes += size


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, suffix


def _check_member(member: tarfile.TarInfo, twice: bool, path: str | os.PathLike[str]) -> None:
    if not member.isfile():
        raise ValueError(f"{path} must hold plain files, got {member.name!r}, which is not one")
    if member.size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"{path} must hold files of at most {MAX_MEMBER_BYTES} bytes, got {member.name!r} "
            f"of {member.size}"
        )
    if twice:
        raise ValueError(f"{path} must hold each file once, got {member.name!r} twice")
