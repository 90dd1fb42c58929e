"""What importers share: settings, places in files, videos found by name.

An importer reads one file and yields, for each entry, the clip or the problem that keeps it out:
nothing is dropped in silence, and one bad row does not keep the others out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from cac_reward.batch import SUFFIXES
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.plain import read_number
from cac_reward.report import TimeWindow
from cac_reward.video import VideoHeader

Entry = TypeVar("Entry")

MAX_LINE_CHARACTERS = 1000
ANY_BYTES = "surrogateescape"
"""How files are opened, so that a byte that is not UTF-8 keeps out its own entry only."""
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")


@dataclass(frozen=True)
class Problem:
    """An entry that was not imported."""

    file: str
    line: int | None
    """Where the entry begins, from 1; None where the file has no lines."""
    column: str | None
    """What of the entry is wrong; None where it is the whole."""
    why: str

    def __str__(self) -> str:
        line = "" if self.line is None else f": line {self.line}"
        column = "" if self.column is None else f", column {self.column}"
        return f"{self.file}{line}{column}: {self.why}"


Outcome = AnnotatedClip | Problem


class ColumnError(ValueError):
    """A value that breaks its rule, with the column it stands in."""

    def __init__(self, column: str, why: str) -> None:
        super().__init__(f"column {column}: {why}")
        self.column, self.why = column, why


@contextmanager
def in_column(column: str) -> Iterator[None]:
    """Inside this context a ValueError is one of this column."""
    try:
        yield
    except ColumnError:
        raise
    except ValueError as error:
        raise ColumnError(column, str(error)) from error


class VideoFolder:
    """Videos below a folder, by their path, name, or name without suffix.

    Raises:
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"videos must be an existing folder, got {root}")
        self.root = root
        self._named: dict[str, list[Path]] = {}
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                place = Path(folder, name)
                if place.suffix.lower() in SUFFIXES:
                    for known in {name, place.stem}:
                        self._named.setdefault(known, []).append(place)
        self.header = lru_cache(maxsize=1)(VideoHeader.read)

    def find(self, names: Iterable[str]) -> Path | None:
        """The video of the first of these names that there is.

        Raises:
            ValueError: If a name stands for several.
        """
        for name in names:
            exact = self.root / name
            if exact.is_file():
                return exact
            last = Path(name).name
            found = self._named.get(last) or self._named.get(Path(last).stem) or []
            if len(found) > 1:
                # The same name in several folders: the one whose folder is called the same.
                folder = Path(name).parent.name.casefold()
                alike = [one for one in found if one.parent.name.casefold() == folder]
                found = alike if len(alike) == 1 else found
            if len(found) > 1:
                raise ValueError(
                    f"video must be there once, got {found[0]} and {found[1]} for {name!r}"
                )
            if found:
                return found[0]
        return None

    def others(self, taken: set[str]) -> Iterator[Path]:
        """Videos whose name without suffix is not among those taken, in order of their names."""
        for name in sorted(self._named):
            for place in self._named[name]:
                if place.stem == name and name not in taken:
                    yield place


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What a file does not say of itself."""

    fps: float | None = None
    """Rate of the clips where frames are counted; else the videos' own."""
    videos: VideoFolder | None = None
    """Where the videos are: fills in path, rate, length and size."""
    split: str | None = None
    """Of the clips; None: as the file, or its name, says."""
    sentences: tuple[Path, ...] = ()
    """UCA's JSON files."""
    path: str | None = None
    """Video of a file that CVAT wrote."""
    empty_is_clean: bool = False
    """Whether a clip on which nothing is marked is clean; else it has no verdict."""

    def __post_init__(self) -> None:
        if self.fps is not None and read_number("fps", self.fps) <= 0:
            raise ValueError(f"fps must be above 0, got {self.fps}; leave it out if not known")

    def clip(self, *names: str) -> dict[str, Any]:
        """Fields of a clip from its video: path, fps, duration_seconds, width, height.

        Args:
            *names: What the video may be called; the first is the path where there is none.

        Raises:
            ValueError: If several videos have the name, or the video cannot be read.
        """
        fields: dict[str, Any] = {"path": names[0], "fps": self.fps}
        found = None if self.videos is None else self.videos.find(names)
        if self.videos is None or found is None:
            return fields
        header = self.videos.header(found)
        fps = header.fps if self.fps is None else self.fps
        fields.update(path=found.relative_to(self.videos.root).as_posix(), fps=fps)
        fields.update(width=header.width, height=header.height)
        if header.num_frames:
            fields["duration_seconds"] = header.num_frames / fps
        return fields


def read_entries(
    path: Path, entries: Iterable[tuple[int | None, Entry]], read: Callable[[Entry], AnnotatedClip]
) -> Iterator[Outcome]:
    """The clip of each entry, or why there is none.

    Args:
        path: Of the file, for messages.
        entries: Line and content of each.
        read: Makes a clip of the content, or raises a ValueError.
    """
    for line, entry in entries:
        try:
            yield read(entry)
        except ColumnError as error:
            yield Problem(str(path), line, error.column, error.why)
        except ValueError as error:
            yield Problem(str(path), line, None, str(error))


def check_utf8(text: str) -> None:
    """Refuse text of a file opened with `ANY_BYTES` that holds another byte than UTF-8's.

    Raises:
        ValueError: If it does, with the byte.
    """
    bad = None if text.isascii() else _NOT_UTF8.search(text)
    if bad is not None:
        raise ValueError(
            f"text must be UTF-8, got byte {ord(bad.group()) - 0xDC00:#04x} at character "
            f"{bad.start() + 1}; write it in UTF-8"
        )


def check_texts(value: object) -> None:
    """Refuse a JSON value whose texts or keys `check_utf8` refuses.

    Raises:
        ColumnError: If one does; the column is its place, such as 'sentences'[2].
    """
    waiting: list[tuple[str, object]] = [("", value)]
    for where, one in waiting:
        if isinstance(one, str):
            with in_column(where or "text"):
                check_utf8(one)
        elif isinstance(one, Mapping):
            for key, inner in one.items():
                with in_column(f"{where}[{key!r}]" if where else f"{key!r}"):
                    check_utf8(key)
                waiting.append((f"{where}[{key!r}]" if where else f"{key!r}", inner))
        elif isinstance(one, list):
            waiting += [(f"{where}[{number}]", inner) for number, inner in enumerate(one)]


def json_entries(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line, name (number in a list) and value of each entry of a JSON list or object.

    Bytes that are not UTF-8 stay in the values, for `check_texts`.

    Raises:
        ValueError: If it is neither, with line and column.
    """
    text = path.read_text(encoding="utf-8-sig", errors=ANY_BYTES)
    line, counted = 1, 0
    for place, _, name, value in _members(text, 0, whole=True):
        line += text.count("\n", counted, place)
        counted = place
        yield line, name, value


def entry_lines(text: str, table: str) -> list[int]:
    """The line on which each entry of a list begins that is in the object of a JSON text."""
    lines: list[int] = []
    for _, start, name, value in _members(text, 0, whole=True):
        if name == table and isinstance(value, list):
            places = [place for place, *_ in _members(text, start, whole=False)]
            line = 1 + text.count("\n", 0, start)
            steps = zip([start, *places], places, strict=False)
            lines = list(accumulate((text.count("\n", *step) for step in steps), initial=line))[1:]
    return lines


def _members(text: str, position: int, *, whole: bool) -> Iterator[tuple[int, int, str, Any]]:
    """Where each entry and its value begin, name and value, of the list or object from here on.

    `whole` means that nothing else may follow in the text.
    """
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        while text[position : position + 1].isspace():
            position += 1
        return position

    def expect(position: int, wanted: str) -> int:
        if text[position : position + 1] not in tuple(wanted):
            words = " or ".join(map(repr, wanted))
            raise json.JSONDecodeError(f"JSON must go on with {words}", text, position)
        return skip(position + 1)

    position = skip(position)
    is_list = text[position : position + 1] == "["
    closing = "]" if is_list else "}"
    position = expect(position, "[{")
    number = 0
    while text[position : position + 1] != closing:
        place = position
        name: object = str(number)
        if not is_list:
            name, position = decoder.raw_decode(text, position)
            position = expect(skip(position), ":")
        start = position
        try:
            value, position = decoder.raw_decode(text, position)
        except RecursionError as error:
            line = 1 + text.count("\n", 0, place)
            raise ValueError(f"line {line} must be JSON of a few levels, got too many") from error
        yield place, start, str(name), value
        number += 1
        position = skip(position)
        if text[position : position + 1] != closing:
            position = expect(position, "," + closing)
            if text[position : position + 1] == closing:
                raise json.JSONDecodeError("JSON must have no comma before its end", text, position)
    if whole and skip(position + 1) != len(text):
        raise json.JSONDecodeError("JSON must end here", text, skip(position + 1))


def words_of(line: str) -> list[tuple[str, str]]:
    """Each word of a line, with its column: 'the third, at character 12'.

    Raises:
        ColumnError: If a word is not in UTF-8.
    """
    found = enumerate(re.finditer(r"\S+", line), 1)
    words = [(f"{number} (character {one.start() + 1})", one.group()) for number, one in found]
    for column, word in words:
        with in_column(column):
            check_utf8(word)
    return words


def frame_window(start: tuple[str, str], end: tuple[str, str], fps: float | None) -> TimeWindow:
    """The window from one frame up to, without, another; both as words with their columns.

    Raises:
        ColumnError: If a word is no frame number, or the frames are in the wrong order.
        ValueError: If the rate is not known.
    """
    if fps is None:
        raise ValueError(
            "fps must be known to turn frames into seconds, got none; give it or videos"
        )
    frames = []
    for column, word in (start, end):
        with in_column(column):
            if not re.fullmatch("[0-9]{1,9}", word):
                raise ValueError(f"frame must be a number from 0 on, got {word[:80]!r}")
            frames.append(int(word))
    with in_column(end[0]):
        if frames[0] >= frames[1]:
            raise ValueError(f"frames must be first before last, got {frames[0]} and {frames[1]}")
    return TimeWindow(frames[0] / fps, frames[1] / fps)


def one_line(text: str) -> str:
    """Text as an explanation can hold it: one line, blanks joined, at most 1000 characters."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    if len(line) > MAX_LINE_CHARACTERS:
        line = line[: MAX_LINE_CHARACTERS - 3].rstrip() + "..."
    return line


def split_of(name: str) -> str | None:
    """The split that a file's name tells, for example 'val' of 'UCFCrime_Val.json'."""
    parts = re.split(r"[^a-z]+", Path(name).stem.lower())
    found = {"train": "train", "training": "train", "val": "val", "valid": "val", "test": "test"}
    return next((found[part] for part in parts if part in found), None)
