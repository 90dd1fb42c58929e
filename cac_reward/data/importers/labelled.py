"""Findings drawn in annotation tools: CVAT's XML and COCO's JSON, as the exports write them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ANY_BYTES,
    ImportSettings,
    Outcome,
    Problem,
    check_utf8,
    read_entries,
)
from cac_reward.exports.base import EntryError, LabelledClip
from cac_reward.exports.coco import read_coco
from cac_reward.exports.cvat import read_cvat


def read_cvat_xml(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """The clip of a file, 'CVAT for video 1.1', left out where something in it cannot be read.

    Raises:
        ValueError: If it is no such file, with line and column, or path or rate are not known.
    """
    text = path.read_text(encoding="utf-8-sig", errors=ANY_BYTES)
    for number, line in enumerate(text.split("\n"), 1):
        try:
            check_utf8(line)
        except ValueError as error:
            return iter([Problem(str(path), number, None, str(error))])
    try:
        clip = read_cvat(text, path=settings.path, fps=settings.fps)
    except EntryError as error:
        return iter([Problem(str(path), error.line, error.column, str(error))])
    return _outcomes(path, [clip], settings)


def read_coco_json(path: Path, settings: ImportSettings) -> Iterator[Outcome]:
    """The clips of a file with `videos`.

    Raises:
        ValueError: If it is no such file; the message names the entry.
    """
    return _outcomes(path, read_coco(path.read_text(encoding="utf-8-sig")), settings)


def _outcomes(path: Path, clips: list[LabelledClip], settings: ImportSettings) -> Iterator[Outcome]:
    def read(clip: LabelledClip) -> AnnotatedClip:
        annotated = AnnotatedClip.from_labelled(clip)
        found = None if settings.videos is None else settings.videos.find([clip.path])
        if found is not None and settings.videos is not None:
            place = found.relative_to(settings.videos.root).as_posix()
            annotated = replace(annotated, path=place)
        if settings.empty_is_clean and not clip.findings:
            annotated = replace(annotated, verdict="clean")
        return replace(annotated, source=path.stem, split=settings.split)

    return read_entries(path, [(None, clip) for clip in clips], read)
