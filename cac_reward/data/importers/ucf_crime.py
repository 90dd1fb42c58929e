"""UCF-Crime: windows of the test videos in frames, and UCA's sentences on videos of every split.

A line of the temporal annotation is name, class, and two pairs of frames, -1 where there is none;
frames count at the video's own rate, 30 a second in almost all of them. UCA is JSON: for each video
its length and sentences with windows in seconds.

Source: https://www.crcv.ucf.edu/projects/real-world/ (Temporal_Anomaly_Annotation_for_Testing_
Videos.txt, arXiv:1801.04264); https://github.com/Xuange923/Surveillance-Video-Understanding
(UCFCrime_Train.json, _Val.json, _Test.json, arXiv:2309.13925).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.data.importers.base import (
    ANY_BYTES,
    ImportSettings,
    Outcome,
    Problem,
    check_texts,
    check_utf8,
    frame_window,
    in_column,
    json_entries,
    read_entries,
    split_of,
    words_of,
)
from cac_reward.plain import read_number, read_record, read_sequence, read_string
from cac_reward.report import Finding, TimeWindow
from cac_reward.taxonomy import event_type

NORMAL = "Normal"
_NO_FRAME = "-1"


def read_ucf_crime(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every line of the temporal annotation, with the sentences of `settings.sentences`.

    Raises:
        ValueError: If a file of sentences is no JSON object, or a video has sentences in two.
    """
    described: dict[str, AnnotatedClip] = {}
    for file in settings.sentences:
        for outcome in read_uca(file, ImportSettings()):
            if isinstance(outcome, Problem):
                yield outcome
            elif outcome.path in described:
                raise ValueError(f"sentences must describe a video once, got {outcome.path} twice")
            else:
                described[outcome.path] = outcome
    with path.open(encoding="utf-8-sig", errors=ANY_BYTES) as opened:
        lines = ((number, line) for number, line in enumerate(opened, 1) if line.strip())
        yield from read_entries(path, lines, partial(_clip, settings=settings, described=described))


def read_uca(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every video of a file of sentences; its class is known from its name, its windows are not.

    Raises:
        ValueError: If the file is no JSON object, with line and column.
    """
    entries = ((line, (name, value)) for line, name, value in json_entries(path))
    return read_entries(path, entries, lambda entry: _described(*entry, path, settings))


def _clip(
    line: str, settings: ImportSettings, described: Mapping[str, AnnotatedClip]
) -> AnnotatedClip:
    words = words_of(line)
    if len(words) != 6:
        raise ValueError(f"line must be name, class and four frames, got {len(words)} words")
    (name_column, name), (kind_column, kind), *frames = words
    stem = name.removesuffix(".mp4")
    with in_column(name_column):
        fields = settings.clip(f"{stem}.mp4", stem)
    known = described.get(f"{stem}.mp4")
    if known is not None:
        fields = {"duration_seconds": known.duration_seconds, **fields}
    windows = [
        frame_window(start, end, fields["fps"])
        for start, end in (frames[:2], frames[2:])
        if (start[1], end[1]) != (_NO_FRAME, _NO_FRAME)
    ]
    with in_column(kind_column):
        if (kind == NORMAL) == bool(windows):
            raise ValueError(f"class must be Normal exactly where there is no frame, got {kind!r}")
        event = None if kind == NORMAL else event_type(kind, "ucf_crime")
    return AnnotatedClip(
        **fields,
        source="ucf_crime",
        source_video=f"ucf_crime/{stem}",
        split="test" if settings.split is None else settings.split,
        verdict="clean" if event is None else "anomalous",
        category=kind,
        findings=tuple(Finding(str(event), window) for window in windows),
        captions=() if known is None else known.captions,
    )


def _described(name: str, value: object, path: Path, settings: ImportSettings) -> AnnotatedClip:
    with in_column("name of the video"):
        check_utf8(name)
    check_texts(value)
    record = read_record(name, value, ("duration", "timestamps", "sentences"))
    with in_column("'duration'"):
        duration = read_number("duration", record["duration"])
    captions = _captions(record)
    told = re.match("[A-Za-z]+", name)
    kind = NORMAL if name.startswith(NORMAL) else told.group() if told else ""
    if kind != NORMAL:
        with in_column("name of the video"):
            event_type(kind, "ucf_crime")
    return AnnotatedClip(
        **{"duration_seconds": duration, **settings.clip(f"{name}.mp4", name)},
        source="ucf_crime",
        source_video=f"ucf_crime/{name}",
        split=split_of(path.name) if settings.split is None else settings.split,
        verdict="clean" if kind == NORMAL else "anomalous",
        category=kind,
        captions=captions,
    )


def _captions(record: Mapping[str, Any]) -> tuple[Caption, ...]:
    with in_column("'timestamps'"):
        windows = read_sequence("timestamps", record["timestamps"])
    with in_column("'sentences'"):
        sentences = read_sequence("sentences", record["sentences"])
        if len(sentences) != len(windows):
            raise ValueError(f"sentences must be as many as windows, got {len(sentences)}")
    captions = []
    for number, (window, sentence) in enumerate(zip(windows, sentences, strict=True)):
        with in_column(f"'timestamps'[{number}]"):
            seconds = TimeWindow.from_json(window)
        with in_column(f"'sentences'[{number}]"):
            captions.append(Caption(seconds, read_string("sentence", sentence).strip()))
    return tuple(captions)
