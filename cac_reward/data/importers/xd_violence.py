"""XD-Violence: a video and its violent stretches in frames on each line, its classes in its name.

The published file lists only the violent test videos. Videos that it does not list, found in the
folder of videos, are clean where their name says so (`label_A`) and violent without known windows
otherwise, as the training videos are.

Source: https://roc-ng.github.io/XD-Violence/ (annotations.txt, arXiv:2007.04687). Frames count at
the video's own rate, 24 a second in most.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ANY_BYTES,
    ImportSettings,
    Outcome,
    Problem,
    frame_window,
    in_column,
    read_entries,
    words_of,
)
from cac_reward.report import UNSPECIFIED, Finding
from cac_reward.taxonomy import event_type

_LABEL = re.compile(r"_label_([A-Z][0-9]?(?:-[A-Z0-9]+)*)$")
_CLEAN = "A"


def read_xd_violence(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """Every line of the file, then every video of the folder that it does not list."""
    listed = set()
    with path.open(encoding="utf-8-sig", errors=ANY_BYTES) as opened:
        lines = ((number, line) for number, line in enumerate(opened, 1) if line.strip())
        for outcome in read_entries(path, lines, lambda line: _clip(line, settings)):
            if isinstance(outcome, AnnotatedClip):
                listed.add(Path(outcome.path).stem)
            yield outcome
    if settings.videos is not None:
        for video in settings.videos.others(listed):
            place = settings.videos.root
            for one in read_entries(
                place, [(None, video.stem)], lambda stem: _clip(stem, settings)
            ):
                yield Problem(str(video), None, None, one.why) if isinstance(one, Problem) else one


def _clip(line: str, settings: ImportSettings) -> AnnotatedClip:
    words = words_of(line)
    column, name = words[0]
    stem = name.removesuffix(".mp4")
    with in_column(column):
        codes = _codes(stem)
        events = [event_type(code, "xd_violence") for code in codes if code != _CLEAN]
        fields = settings.clip(f"{stem}.mp4", stem)
    if len(words) % 2 == 0:
        raise ValueError(f"line must have frames in pairs, got {len(words) - 1}")
    pairs = zip(words[1::2], words[2::2], strict=True)
    windows = [frame_window(start, end, fields["fps"]) for start, end in pairs]
    if windows and not events:
        raise ValueError("video named label_A must have no violent frames, got some")
    # Where a video is of several classes, nobody has said which window is of which.
    kind = events[0] if len(events) == 1 else UNSPECIFIED
    return AnnotatedClip(
        **fields,
        source="xd_violence",
        # Clips of one film, or of one video of the web, begin with its name.
        source_video=f"xd_violence/{stem.partition('__#')[0]}",
        split=settings.split if settings.split is not None else "test" if windows else None,
        verdict="anomalous" if events else "clean",
        category="-".join(codes),
        findings=tuple(Finding(kind, window) for window in windows),
    )


def _codes(stem: str) -> list[str]:
    label = _LABEL.search(stem)
    if label is None:
        raise ValueError(f"name must end in its classes, for example _label_B1-0-0, got {stem!r}")
    return [code for code in label[1].split("-") if code != "0"]
