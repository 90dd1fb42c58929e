"""DeepTraceReward's all_data.json: a row for each trace that an expert marked, or for a real clip.

A trace has one box, in pixels and at its first frame, a first frame and a length in seconds, words
where the expert wrote any, and tags of the labelling tool, which are read as the paper's classes.

Source: https://huggingface.co/datasets/DeeptraceReward/RewardData (arXiv:2509.22646); names of the
fields as public code that reads the release has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ColumnError,
    ImportSettings,
    Outcome,
    Problem,
    check_texts,
    in_column,
    json_entries,
    one_line,
)
from cac_reward.exports.base import make_box
from cac_reward.plain import read_integer, read_number, read_record, read_string
from cac_reward.report import UNSPECIFIED, Box, Finding, TimeWindow
from cac_reward.taxonomy import leaf_type

TYPES = {"fake_video": "anomalous", "real_video": "clean"}
# Words of the tags, from the narrow to the wide, and the class of the paper that they tell.
_CLASSES = (
    ("merg", "object merging"),
    ("split", "object splitting"),
    ("disappear", "object disappearance"),
    ("vanish", "object disappearance"),
    ("redundant", "redundant object"),
    ("extra object", "redundant object"),
    ("appear", "redundant object"),
    ("blur", "sudden blurring"),
    ("background", "background distortion"),
    ("unexpected mov", "unexpected move"),
    ("trajector", "object trajectory"),
    ("movement path", "object trajectory"),
    ("weird motion", "object trajectory"),
    ("unsmooth motion", "object trajectory"),
    ("distort", "object distortion"),
    ("deform", "object distortion"),
)

Row = tuple[int, Mapping[str, Any]]


def read_deeptrace_reward(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every video of the file, in the order of their first rows.

    The rows of a video, some 10 MB for the whole file, are brought together first. A video with a
    row that cannot be read is left out, with a problem for each of its rows: half of its faults
    would make the rest of it look clean.

    Raises:
        ValueError: If the file is no JSON list, with line and column.
    """
    videos: dict[str, list[Row]] = {}
    for line, _, row in json_entries(path):
        if not isinstance(row, Mapping) or not isinstance(row.get("video_id"), str):
            yield Problem(str(path), line, "'video_id'", "row must be an object with a video_id")
        else:
            videos.setdefault(row["video_id"], []).append((line, row))
    for rows in videos.values():
        yield from _outcomes(rows, path, settings)


def _outcomes(rows: list[Row], path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    findings, bad = [], {}
    for line, row in rows:
        try:
            check_texts(row)
            with in_column("'video_type'"):
                kind = row.get("video_type")
                if kind not in TYPES or kind != rows[0][1].get("video_type"):
                    raise ValueError(f"video_type must be one of {list(TYPES)}, got {kind!r}")
            if TYPES[kind] == "anomalous":
                findings.append(_finding(row))
        except ColumnError as error:
            bad[line] = Problem(str(path), line, error.column, error.why)
    if not bad:
        try:
            yield _clip(rows, findings, settings)
            return
        except ColumnError as error:
            bad[rows[0][0]] = Problem(str(path), rows[0][0], error.column, error.why)
        except ValueError as error:
            bad[rows[0][0]] = Problem(str(path), rows[0][0], None, str(error))
    first = min(bad)
    for line, _ in rows:
        why = f"left out with line {first}, which is of the same video"
        yield bad.get(line) or Problem(str(path), line, None, why)


def _clip(rows: list[Row], findings: list[Finding], settings: ImportSettings) -> AnnotatedClip:
    row = rows[0][1]
    with in_column("'video_path'"):
        path = read_string("video_path", row.get("video_path"))
        known = {name: one for name, one in settings.clip(path).items() if one is not None}
    tags = {f"tags {n}": ", ".join(_tags(one)) for n, (_, one) in enumerate(rows, 1) if _tags(one)}
    prompt = row.get("video_prompt")
    stated = {
        "fps": _positive(row, "video_frame_rate"),
        "duration_seconds": _positive(row, "video_duration"),
        "width": int(_positive(row, "video_width")),
        "height": int(_positive(row, "video_height")),
    }
    return AnnotatedClip(
        **{**stated, **known},
        source=f"deeptrace_reward/{row.get('video_source') or 'unknown'}",
        source_video=row["video_id"],
        split=row.get("split") if settings.split is None else settings.split,
        prompt=prompt if isinstance(prompt, str) else "",
        verdict=TYPES[row["video_type"]],
        findings=tuple(findings),
        extra=tags,
    )


def _finding(row: Mapping[str, Any]) -> Finding:
    fps, duration = _positive(row, "video_frame_rate"), _positive(row, "video_duration")
    with in_column("'faketrace_first_frame'"):
        name = "faketrace_first_frame"
        first = read_number(name, read_integer(name, _plain_int(row.get(name))))
        if not 0 <= first / fps < duration:
            raise ValueError(
                f"first frame must be in the clip of {duration} s at {fps} fps, got {first}"
            )
    start = first / fps
    length = _positive(row, "faketrace_duration")
    window = TimeWindow(start, min(start + length, duration))
    with in_column("'faketrace_bbox'"):
        boxes = _boxes(row, start)
    explanation = row.get("faketrace_explanations")
    why = one_line(explanation) if isinstance(explanation, str) else ""
    return Finding(_kind(_tags(row)), window, boxes, why=why)


def _boxes(row: Mapping[str, Any], start: float) -> tuple[Box, ...]:
    if row.get("faketrace_bbox") is None:
        return ()
    sides = ("left", "top", "width", "height")
    given = read_record("faketrace_bbox", row["faketrace_bbox"], sides)
    left, top, wide, high = (read_number(side, given[side]) for side in sides)
    width, height = _positive(row, "video_width"), _positive(row, "video_height")
    corners = (left / width, top / height, (left + wide) / width, (top + high) / height)
    return (make_box(start, corners),)


def _tags(row: Mapping[str, Any]) -> list[str]:
    tags = row.get("faketrace_check_applies")
    return [one for one in tags if isinstance(one, str)] if isinstance(tags, list) else []


def _kind(tags: list[str]) -> str:
    """Our type for the first tag that tells one."""
    for tag in tags:
        text = re.sub(r"[\s_-]+", " ", tag.lower())
        for words, name in _CLASSES:
            if words in text:
                return leaf_type(name, "deeptrace_reward").name
    return UNSPECIFIED


def _positive(row: Mapping[str, Any], name: str) -> float:
    with in_column(f"'{name}'"):
        value = read_number(name, row.get(name))
        if value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
        return value


def _plain_int(value: object) -> object:
    """What a table program wrote as 12.0 is 12."""
    return (
        int(value)
        if isinstance(value, float) and math.isfinite(value) and value % 1 == 0
        else value
    )
