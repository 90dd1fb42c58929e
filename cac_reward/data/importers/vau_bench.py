"""VAU-Bench: questions, descriptions, reasoning, class and one window for each clip, as CSV.

Times are seconds. 0 and 0 mark a normal clip, -1 and -1 an abnormal one whose window is not known,
and -1 elsewhere stands for what is missing.

Source: https://github.com/GVCLab/VAU-R1 (arXiv:2505.23504), annotations under MIT.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cac_reward.data.annotations import LETTERS, AnnotatedClip
from cac_reward.data.importers.base import (
    ANY_BYTES,
    ImportSettings,
    Outcome,
    check_utf8,
    in_column,
    read_entries,
    split_of,
)
from cac_reward.report import UNSPECIFIED, Finding, TimeWindow
from cac_reward.taxonomy import event_type

OPTIONS = ("Option 1", "Option 2", "Option 3", "Option 4")
COLUMNS = (
    *("Video Name", "Question", *OPTIONS, "Correct Option", "Key Object", "Description"),
    *("Reasoning", "Anomaly Class", "Start Time", "End Time"),
)
VIDEO_NAME = "video_name"
"""Key in `AnnotatedClip.extra`: what the file calls a video whose path ends otherwise."""
MISSING = "-1"
NORMAL = "Normal"
# Videos are called so in the mixed files; in the data sets themselves they have no such prefix.
_PREFIXES = {"ecva": "ecva", "ucf": "ucf_crime", "msad": "msad"}


def read_vau_bench(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every row of a file, in order.

    Raises:
        ValueError: If the header is another one, or the file is no CSV.
    """
    with path.open(encoding="utf-8-sig", errors=ANY_BYTES, newline="") as opened:
        table = csv.reader(opened, strict=True)
        try:
            columns = _columns(next(table, []))
            rows = _rows(table)
            yield from read_entries(path, rows, lambda row: _clip(row, columns, path, settings))
        except csv.Error as error:
            raise ValueError(f"line {table.line_num} must be CSV, got: {error}") from error


def _columns(header: list[str]) -> dict[str, int]:
    # The loader of VAU-R1 asks for them in small letters, the files have capitals.
    places = {name.strip().lower(): number for number, name in enumerate(header)}
    missing = [name for name in COLUMNS if name.lower() not in places]
    if missing:
        raise ValueError(f"line 1 must have the column {missing[0]!r}, got {header}")
    return {name: places[name.lower()] for name in COLUMNS}


def _rows(table: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which each begins; a cell may hold several lines."""
    while True:
        line = table.line_num + 1
        row = next(table, None)
        if row is None:
            return
        yield line, row


def _clip(
    row: list[str], columns: dict[str, int], path: Path, settings: ImportSettings
) -> AnnotatedClip:
    if len(row) <= max(columns.values()):
        raise ValueError(f"row must have {max(columns.values()) + 1} cells, got {len(row)}")
    cells = {name: row[place].strip() for name, place in columns.items()}
    for name, cell in cells.items():
        with in_column(f"{name!r}"):
            check_utf8(cell)
    with in_column("'Video Name'"):
        if not cells["Video Name"]:
            raise ValueError("name must be that of a video, got ''; fill it in")
        origin, own_name = _origin(cells["Video Name"], path)
        fields = settings.clip(cells["Video Name"], own_name)
    given = {name: None if one in ("", MISSING) else one for name, one in cells.items()}
    extra = {} if given["Key Object"] is None else {"key_object": str(given["Key Object"])}
    if Path(fields["path"]).name != cells["Video Name"]:
        extra[VIDEO_NAME] = cells["Video Name"]
    verdict, window = _judged(cells)
    kind = UNSPECIFIED
    if given["Anomaly Class"] not in (None, NORMAL):
        with in_column("'Anomaly Class'"):
            kind = event_type(cells["Anomaly Class"], "vau_bench")
    return AnnotatedClip(
        **fields,
        **_asked(given),
        source="vau_bench",
        source_video=f"{origin}/{Path(own_name).stem}",
        split=split_of(path.name) if settings.split is None else settings.split,
        verdict=verdict,
        category=given["Anomaly Class"],
        findings=() if window is None else (Finding(kind, window),),
        description=given["Description"],
        reasoning=given["Reasoning"],
        extra=extra,
    )


def _origin(name: str, path: Path) -> tuple[str, str]:
    """Data set that the video comes from, and what the video is called there."""
    prefix, _, rest = name.partition("_")
    if prefix in _PREFIXES and rest:
        return _PREFIXES[prefix], rest
    told = [one for part, one in _PREFIXES.items() if part in path.stem.lower().split("_")]
    return (told[0] if told else "vau_bench"), name


def _judged(cells: dict[str, str]) -> tuple[str | None, TimeWindow | None]:
    """Verdict and window that class and times agree on."""
    times = []
    for name in ("Start Time", "End Time"):
        with in_column(f"{name!r}"):
            times.append(_seconds(cells[name]))
    start, end = times
    kind = cells["Anomaly Class"]
    with in_column("'End Time'"):
        if (start == -1) != (end == -1):
            raise ValueError(f"times must be missing together, got {start} and {end}")
        window = None if (start, end) in ((0, 0), (-1, -1)) else TimeWindow(start, end)
    with in_column("'Anomaly Class'"):
        if kind == NORMAL and window is not None:
            raise ValueError(f"class must not be {NORMAL!r} with a window, got {start} to {end}")
        if kind not in (NORMAL, MISSING) and (start, end) == (0, 0):
            raise ValueError(f"class must be {NORMAL!r} where both times are 0, got {kind!r}")
    if kind == NORMAL or (start, end) == (0, 0):
        return "clean", None
    return (None if kind == MISSING and window is None else "anomalous"), window


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise ValueError(f"time must be seconds, 0 or -1, got {text!r}") from error
    if not (math.isfinite(seconds) and (seconds >= 0 or seconds == -1)):
        raise ValueError(f"time must be seconds from 0 on, or -1, got {text!r}")
    return seconds


def _asked(given: dict[str, str | None]) -> dict[str, Any]:
    """Question, options and answer; none of them where one is missing."""
    options = tuple(one for one in (given[name] for name in OPTIONS) if one is not None)
    question, answer = given["Question"], given["Correct Option"]
    if question is None or answer is None or len(options) < len(OPTIONS):
        return {}
    with in_column("'Correct Option'"):
        letter, dot, words = answer.partition(".")
        if letter not in tuple(LETTERS[: len(OPTIONS)]):
            raise ValueError(f"answer must begin with a letter from A to D, got {answer!r}")
        # Some rows spell the option out behind its letter.
        if dot and words.strip() != options[LETTERS.index(letter)]:
            raise ValueError(
                f"answer must be the option of its letter, {options[LETTERS.index(letter)]!r}, "
                f"got {answer!r}"
            )
    return {"question": question, "options": options, "answer": letter}
