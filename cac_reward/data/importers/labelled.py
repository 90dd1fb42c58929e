"""Findings drawn in annotation tools: CVAT's XML and COCO's JSON, as the exports write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from reprlib import repr as short
from typing import Any

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.importers.base import (
    ANY_BYTES,
    ImportSettings,
    Outcome,
    Problem,
    check_texts,
    check_utf8,
    entry_lines,
    read_entries,
)
from cac_reward.data.videos import PICTURES, frame_files, frame_order
from cac_reward.exports.base import EntryError, LabelledClip, reading
from cac_reward.exports.coco import CocoFault, coco_outcomes
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
    """The clips of a file with `videos`, or of one with `images` only, a clip for each folder.

    A clip with an entry that cannot be read is left out whole, with a problem for each of them.

    Raises:
        ValueError: If it is no such file, with line and column, or is of images and no rate is
            given.
    """
    text = path.read_text(encoding="utf-8-sig", errors=ANY_BYTES)
    faults: list[CocoFault] = []
    with reading("COCO file"):
        plain = json.loads(text)
        if isinstance(plain, dict) and "videos" not in plain and "images" in plain:
            plain, faults = _with_videos(plain, settings)
        found = coco_outcomes(plain, settings.fps, check_texts)
    named = {(one.table, one.row) for one in faults}
    for one in found:
        if isinstance(one, CocoFault) and (one.table, one.row) not in named:
            faults.append(one)
    lines = {table: entry_lines(text, table) for table in {one.table for one in faults}}
    for fault in faults:
        # Videos that were made of folders stand nowhere in the file.
        known = fault.row < len(lines[fault.table])
        line = lines[fault.table][fault.row] if known else None
        yield Problem(str(path), line, f"{fault.table}[{fault.row}]", fault.why)
    clips = [one for one in found if isinstance(one, LabelledClip)]
    yield from _outcomes(path, clips, settings)


def _with_videos(
    plain: dict[str, Any], settings: ImportSettings
) -> tuple[dict[str, Any], list[CocoFault]]:
    """A file of images with a video for each folder of them, and which images are no frames."""
    if settings.fps is None:
        raise ValueError(
            "fps must be given for a COCO file without videos, whose images become frames, got "
            "none; give it with --fps"
        )
    rows = plain["images"] if isinstance(plain["images"], list) else []
    files = [_file_of(row) for row in rows]
    folders: dict[PurePosixPath, Counter[str]] = {}
    for file in files:
        if file is not None:
            folders.setdefault(file.parent, Counter())[file.name] += 1
    orders = {one: _frame_numbers(one, names, settings) for one, names in folders.items()}
    videos: dict[PurePosixPath, dict[str, Any]] = {}
    images: list[object] = []
    faults = []
    for number, (row, file) in enumerate(zip(rows, files, strict=True)):
        if file is None:
            images.append(row)
            told = f"image must have a file_name, got {short(row)}"
            faults.append(CocoFault("images", number, told))
            continue
        order, name = orders[file.parent], file.parent.as_posix()
        size = {side: row.get(side) for side in ("width", "height")}
        video = videos.setdefault(
            file.parent, {"id": name, "name": name, "num_frames": len(order), **size}
        )
        why = _no_frame(file, size, video)
        if folders[file.parent][file.name] > 1:
            why = f"file_name must be there once, got {str(file)!r} more often"
        elif file.name not in order:
            why = f"file_name must be a picture of its folder, got {str(file)!r}"
        if why is not None:
            faults.append(CocoFault("images", number, why))
        frame = None if why is not None else order[file.name]
        images.append({**row, "video_id": name, "frame_index": frame})
    return {**plain, "videos": list(videos.values()), "images": images}, faults


def _file_of(row: object) -> PurePosixPath | None:
    name = row.get("file_name") if isinstance(row, dict) else None
    return PurePosixPath(name) if isinstance(name, str) and name else None


def _frame_numbers(
    folder: PurePosixPath, names: Iterable[str], settings: ImportSettings
) -> dict[str, int]:
    """Each frame's number: of the folder's files where they are here, else of those named."""
    place = None if settings.videos is None else settings.videos.root / folder
    if place is not None and place.is_dir():
        order = [one.name for one in frame_files(place)]
    else:
        pictures = (one for one in names if PurePosixPath(one).suffix.lower() in PICTURES)
        order = sorted(pictures, key=frame_order)
    return {name: number for number, name in enumerate(order)}


def _no_frame(
    file: PurePosixPath, size: Mapping[str, object], video: Mapping[str, Any]
) -> str | None:
    """Why an image cannot be a frame of its folder's clip; None where it can."""
    if video["num_frames"] < 2:
        return f"folder must hold at least 2 frames, got {video['num_frames']} in {video['name']!r}"
    known = {side: video[side] for side in size}
    if size != known or None in size.values():
        return f"images of a folder must state one size, got {size} and {known} in {str(file)!r}"
    return None


def _outcomes(path: Path, clips: list[LabelledClip], settings: ImportSettings) -> Iterator[Outcome]:
    def read(clip: LabelledClip) -> AnnotatedClip:
        annotated = AnnotatedClip.from_labelled(clip)
        found = None
        # A folder of frames is its own name.
        if settings.videos is not None and not (settings.videos.root / clip.path).is_dir():
            found = settings.videos.find([clip.path])
        if found is not None and settings.videos is not None:
            place = found.relative_to(settings.videos.root).as_posix()
            annotated = replace(annotated, path=place)
        if settings.empty_is_clean and not clip.findings:
            annotated = replace(annotated, verdict="clean")
        return replace(annotated, source=path.stem, split=settings.split)

    return read_entries(path, [(None, clip) for clip in clips], read)
