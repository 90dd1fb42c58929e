"""Whether annotations can be trained on: every fault of a file, counted, with its place.

Clips are looked at one at a time; what must be remembered of all of them (names and origins) is in
a temporary table on the disk.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from types import MappingProxyType

from cac_reward.data.annotations import FIRST_REASONING, AnnotatedClip, SchemaError
from cac_reward.data.shards import read_shard
from cac_reward.data.storage import Record, iterate_records, refusal
from cac_reward.report import TIME_TOLERANCE, UNSPECIFIED, Box, Finding, TimeWindow
from cac_reward.taxonomy import EVENT_TYPES, LEAF_TYPES

RULES: Mapping[str, str] = MappingProxyType(
    {
        "form": "is a clip of this schema",
        "time": "times are inside the clip, boxes inside their window",
        "box": "boxes are inside the frame and have an area",
        "type": "types are in the taxonomy",
        "text": "texts hold no control tokens, which training skips",
        "file": "the video is there",
        "duplicate": "a clip, or a question on it, is there once",
        "leak": "clips of one source video are in one split",
    }
)
_NAMED = ("schema_version", "path", "key", "source_video", "split")
_CORES = (
    (*_NAMED, "duration_seconds", "findings", "fps"),
    (*_NAMED, "duration_seconds", "findings"),
    (*_NAMED, "findings"),
    _NAMED[:3],
)
"""Fields by which a clip is checked where others of it are wrong; as many as can be read."""
CONTROL_TOKEN = re.compile(r"<\|[^<>|]*\|>")
"""As the models' templates write them; which of them a model knows its tokenizer says."""
KNOWN_TYPES = frozenset({*LEAF_TYPES, *EVENT_TYPES, UNSPECIFIED})
UNKNOWN_RATE_TOLERANCE = 0.05
"""Seconds past the end of a clip that are rounding where the rate is not known; else one frame."""


@dataclass(frozen=True)
class Fault:
    """One breach of one rule."""

    rule: str
    """A key of `RULES`."""
    place: str
    """Where in the file, for example 'line 3'."""
    clip: str
    """Name of the clip; empty where it could not be read."""
    why: str


@dataclass
class SplitCount:
    """What one split holds."""

    clips: int = 0
    clean: int = 0
    anomalous: int = 0
    windows: int = 0
    boxes: int = 0
    questions: int = 0


@dataclass
class CheckReport:
    """What a file holds and what is wrong with it."""

    clips: int = 0
    """Entries, readable or not."""
    splits: dict[str, SplitCount] = field(default_factory=dict)
    """By split; '' for clips without one."""
    types: Counter[str] = field(default_factory=Counter)
    """Findings by type."""
    counts: Counter[str] = field(default_factory=Counter)
    """Faults by rule."""
    first: list[Fault] = field(default_factory=list)
    """The first faults."""
    unknown_length: int = 0
    """Clips whose length is not known, so that their times could not be checked against it."""
    files_checked: bool = True
    """Whether videos were looked for."""

    @property
    def has_faults(self) -> bool:
        return sum(self.counts.values()) > 0

    def to_dict(self) -> dict[str, object]:
        """A tree of plain JSON values."""
        return {
            **vars(self),
            "splits": {name: asdict(one) for name, one in self.splits.items()},
            "first": [asdict(one) for one in self.first],
            "has_faults": self.has_faults,
        }


def check_annotations(
    path: str | os.PathLike[str],
    records: Iterable[Record] | None = None,
    *,
    videos: Path | None,
    keep: int = 20,
) -> CheckReport:
    """Check every entry of an annotation file.

    Args:
        path: Of the file, or of a folder of files of one kind.
        records: What `iterate_records` gives for it, for example through a progress bar.
        videos: Root of the clips' relative paths; None looks for no files.
        keep: Faults to keep in words; all are counted.

    Raises:
        FileNotFoundError: If there is no such file.
        SchemaError: If an entry is of another schema version; the message has the command that
            converts the file.
        ValueError: If the file is broken as a whole.
    """
    report = CheckReport(files_checked=videos is not None)
    with _Memory() as memory:
        for record in iterate_records(path) if records is None else records:
            report.clips += 1
            try:
                faults = list(_faults(record, report, memory, videos))
            except SchemaError as error:
                raise refusal(error, path, record.place) from error
            report.counts.update(fault.rule for fault in faults)
            report.first += faults[: keep - len(report.first)]
    return report


def format_report(report: CheckReport) -> str:
    """The report as a table for people."""
    rows = [["split", *SplitCount.__dataclass_fields__]]
    for split in sorted(report.splits):
        counts = asdict(report.splits[split]).values()
        rows.append([split or "(none)", *(f"{one:,}" for one in counts)])
    lines = [f"{report.clips:,} clips", "", *_aligned(rows)]
    if report.types:
        kinds = sorted(report.types.items(), key=lambda one: (-one[1], one[0]))
        lines += ["", *_aligned([["type", "findings"], *([name, f"{n:,}"] for name, n in kinds)])]
    table = [["rule", "faults", "means that"]]
    table += [[rule, f"{report.counts[rule]:,}", means] for rule, means in RULES.items()]
    lines += ["", *_aligned(table, right={1})]
    notes = []
    if report.unknown_length:
        notes.append(f"{report.unknown_length:,} clips of unknown length: ends not checked")
    if not report.files_checked:
        notes.append("videos were not looked for")
    lines += ["", *notes] if notes else []
    if report.first:
        lines += ["", f"first {len(report.first)} of {sum(report.counts.values()):,} faults"]
        lines += [
            f"  {one.place} {one.rule}: {one.clip + ': ' if one.clip else ''}{one.why}"
            for one in report.first
        ]
    return "\n".join(lines)


class _Memory:
    """Names and origins of all clips, in a table that SQLite spills to the disk."""

    def __enter__(self) -> _Memory:
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("PRAGMA cache_size = -65536")
        self._table.execute("PRAGMA journal_mode = OFF")
        for name in ("names", "origins"):
            self._table.execute(
                f"CREATE TABLE {name} (key TEXT PRIMARY KEY, place TEXT, split TEXT) WITHOUT ROWID"
            )
        self._table.execute("BEGIN")
        return self

    def __exit__(self, *error: object) -> None:
        self._table.close()

    def first(self, table: str, key: str, place: str, split: str) -> tuple[str, str] | None:
        """Place and split of the first entry with this key; None if it is this one."""
        added = self._table.execute(
            f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?)", (key, place, split)
        )
        if added.rowcount:
            return None
        query = f"SELECT place, split FROM {table} WHERE key = ?"
        found: tuple[str, str] = self._table.execute(query, (key,)).fetchone()
        return found


def _faults(
    record: Record, report: CheckReport, memory: _Memory, videos: Path | None
) -> Iterator[Fault]:
    if record.fault is not None:
        yield Fault("form", record.place, "", record.fault)
        return
    name = record.plain.get("path") if isinstance(record.plain, Mapping) else None
    found: list[tuple[str, str]] = []
    try:
        clip: AnnotatedClip | None = AnnotatedClip.from_dict(record.plain)
    except SchemaError:
        raise
    except ValueError as error:
        found, clip, numbers = _mended(record.plain, str(error))
    else:
        assert clip is not None
        numbers = list(range(len(clip.findings)))
        _count(clip, report)
    if clip is not None:
        name = clip.name
        found += [*_content_faults(clip, numbers), *_file_faults(clip, videos)]
        found += _meeting_faults(clip, record.place, memory, videos)
    for rule, why in found:
        yield Fault(rule, record.place, name if isinstance(name, str) else "", why)


def _meeting_faults(
    clip: AnnotatedClip, place: str, memory: _Memory, videos: Path | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with a clip beside those before it, however their paths are spelt."""
    key = "\0".join((_spelt(clip.path, videos), clip.key or "", clip.question or ""))
    twin = memory.first("names", key, place, clip.split or "")
    if twin is not None:
        yield "duplicate", f"clip must be there once, first {twin[0]}"
    if clip.split is not None:
        kin = memory.first("origins", _spelt(clip.origin, videos), place, clip.split)
        if kin is not None and kin[1] != clip.split:
            yield (
                "leak",
                f"source video {clip.origin!r} must be in one split, got {clip.split!r} and "
                f"{kin[1]!r} in {kin[0]}",
            )


def _spelt(path: str, videos: Path | None) -> str:
    """The one spelling of a path: where its file is, or without looking."""
    return os.path.normpath(path) if videos is None else os.path.realpath(videos / path)


def _count(clip: AnnotatedClip, report: CheckReport) -> None:
    split = report.splits.setdefault(clip.split or "", SplitCount())
    split.clips += 1
    split.clean += clip.verdict == "clean"
    split.anomalous += clip.verdict == "anomalous"
    split.windows += len(clip.findings)
    split.boxes += sum(len(finding.boxes) for finding in clip.findings)
    split.questions += clip.question is not None
    report.types.update(finding.type for finding in clip.findings)
    report.unknown_length += clip.duration_seconds is None


def _content_faults(clip: AnnotatedClip, numbers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Of times and types; `numbers` are those of its findings in the file."""
    length = clip.duration_seconds
    allowed = UNKNOWN_RATE_TOLERANCE if clip.fps is None else 1 / clip.fps + TIME_TOLERANCE
    findings = list(zip(numbers, clip.findings, strict=False))
    windows = [(f"findings[{n}]", one.window) for n, one in findings]
    windows += [(f"captions[{n}]", one.window) for n, one in enumerate(clip.captions)]
    for where, window in windows:
        if length is not None and window.end_seconds > length + allowed:
            yield "time", f"{where} must end in the clip of {length:g} s, got {window.to_json()}"
    for number, finding in findings:
        if finding.type not in KNOWN_TYPES:
            yield "type", f"findings[{number}] must have a known type, got {finding.type!r}"
    for where, text in _texts(clip):
        found = CONTROL_TOKEN.search(text)
        if found is not None:
            yield "text", f"{where} must not hold control tokens, got {found[0]!r}"


def _texts(clip: AnnotatedClip) -> Iterator[tuple[str, str]]:
    """What lessons teach to say of a clip; prompt, question and options are cleaned where shown."""
    for name in ("description", "reasoning", "first_answer", "reflection"):
        yield name, getattr(clip, name) or ""
    yield from ((f"captions[{n}].text", one.text) for n, one in enumerate(clip.captions))
    yield from ((f"findings[{n}].why", one.why) for n, one in enumerate(clip.findings))
    yield f"extra.{FIRST_REASONING}", clip.extra.get(FIRST_REASONING, "")


def _file_faults(clip: AnnotatedClip, videos: Path | None) -> Iterator[tuple[str, str]]:
    if videos is None:
        return
    place = videos / clip.path
    if not place.exists():
        yield "file", f"video must be an existing file, got {place}"
    elif clip.key is not None:
        try:
            keys = _keys(place)
        except (ValueError, tarfile.TarError) as error:
            yield "file", str(error)
            return
        if clip.key not in keys:
            yield "file", f"shard must hold the sample {clip.key!r}, got none in {place}"


@lru_cache(maxsize=8)
def _keys(shard: Path) -> frozenset[str]:
    return frozenset(sample.key for sample in read_shard(shard, set()))


def _mended(
    plain: object, why: str
) -> tuple[list[tuple[str, str]], AnnotatedClip | None, list[int]]:
    """Faults of an entry that is no clip; what can be read of it; its findings' numbers in it."""
    if not isinstance(plain, Mapping):
        return [("form", why)], None, []
    listed = plain.get("findings")
    faults, kept = _located(listed) if isinstance(listed, list) else ([], {})
    whole = {**plain, "findings": list(kept.values())} if isinstance(listed, list) else plain
    for number, names in enumerate((tuple(whole), *_CORES)):
        try:
            clip = AnnotatedClip.from_dict({name: whole[name] for name in names if name in whole})
        except ValueError as error:
            faults += [("form", str(error))] if number == 0 else []
        else:
            return faults, clip, list(kept)
    return faults, None, []


def _located(listed: Sequence[object]) -> tuple[list[tuple[str, str]], dict[int, object]]:
    """Each fault of findings, and by number those that can be read, without their bad boxes."""
    faults: list[tuple[str, str]] = []
    kept: dict[int, object] = {}
    for number, finding in enumerate(listed):
        where = f"findings[{number}]"
        if not isinstance(finding, Mapping):
            faults.append(("form", f"{where} must be an object, got {short(finding)}"))
            continue
        window = None
        try:
            window = TimeWindow.from_json(finding.get("window"))
        except ValueError as error:
            faults.append(("time", f"{where}: {error}"))
        boxes, good = finding.get("boxes"), []
        for index, one in enumerate(boxes if isinstance(boxes, list) else []):
            fault = _box_fault(one, window)
            if fault is None:
                good.append(one)
            else:
                faults.append((fault[0], f"{where}.boxes[{index}]: {fault[1]}"))
        mended = {**finding, "boxes": good} if isinstance(boxes, list) else {**finding}
        try:
            # Any window does to see whether the rest can be read.
            rest = mended if window is not None else {**mended, "window": [0, 1], "boxes": []}
            Finding.from_json(rest)
        except ValueError as error:
            faults.append(("form", f"{where}: {error}"))
        else:
            kept |= {} if window is None else {number: mended}
    return faults, kept


def _box_fault(plain: object, window: TimeWindow | None) -> tuple[str, str] | None:
    try:
        box = Box.from_json(plain)
    except ValueError as error:
        return "box", str(error)
    if window is None or window.holds(box.time_seconds):
        return None
    return (
        "time",
        f"box time must be inside its window {window.to_json()}, got {box.time_seconds}",
    )


def _aligned(rows: list[list[str]], right: set[int] | None = None) -> list[str]:
    """Rows as columns; numbers, by default all but the first, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = set(range(1, len(widths))) if right is None else right
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
