"""COCO's JSON for videos: boxes in pixels on frames, joined to tracks and videos as in TAO.

`images` are single frames (extract them to `file_name`, or use `video_id` and `frame_index`), so
that tools for pictures read the file too. Windows, reasons and severity are with the tracks.

Source: https://cocodataset.org/#format-data; `videos` and `tracks` as in TAO's annotations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cac_reward.exports.base import (
    Corners,
    LabelledClip,
    Part,
    Track,
    findings_of,
    get,
    make_box,
    parts_of,
    reading,
)

_ROW = "\0row"
"""Key of a row's number in its own copy; no field of a file is called so."""
TABLES = ("videos", "images", "annotations", "tracks", "categories")


def write_coco(clips: Sequence[LabelledClip]) -> str:
    """Write clips as one JSON text."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    categories: dict[str, int] = {}
    for number, clip in enumerate(clips, 1):
        tables["videos"].append(
            {
                "id": number,
                "name": clip.path,
                "width": clip.width,
                "height": clip.height,
                "fps": clip.fps,
                "num_frames": clip.num_frames,
            }
        )
        images: dict[int, int] = {}
        for part in parts_of(clip):
            category = categories.setdefault(part.type, len(categories) + 1)
            _add_part(tables, images, clip, part, (number, category))
    tables["categories"] = [{"id": one, "name": name} for name, one in categories.items()]
    return json.dumps(tables, indent=1, allow_nan=False)


@dataclass(frozen=True)
class CocoFault:
    """An entry that breaks a rule, because of which its video is left out."""

    table: str
    """One of `TABLES`."""
    row: int
    """Of the table, from 0."""
    why: str

    def __str__(self) -> str:
        return f"{self.table}[{self.row}]: {self.why}"


def read_coco(text: str) -> list[LabelledClip]:
    """Read what `write_coco` wrote, or other COCO files with `videos` that state their rate.

    An annotation without a track becomes a finding of one frame.

    Raises:
        ValueError: If a table or an entry is missing or has another form.
    """
    with reading("COCO file"):
        clips = []
        for one in coco_outcomes(json.loads(text)):
            if isinstance(one, CocoFault):
                raise ValueError(str(one))
            clips.append(one)
        return clips


def coco_outcomes(
    plain: object,
    fps: float | None = None,
    check: Callable[[object], None] = lambda row: None,
) -> list[LabelledClip | CocoFault]:
    """The clips of a file as plain JSON, and every entry that keeps its video out.

    Half of a video's boxes would make the rest of it look clean, so a video with an entry that
    cannot be read is left out whole.

    Args:
        plain: The file.
        fps: Frames per second instead of what the videos state.
        check: Raises a ValueError for an entry that must not be read.

    Raises:
        ValueError: If a table is missing or is no list.
    """
    return _Reading(plain, fps, check).outcomes()


def _add_part(
    tables: dict[str, list[dict[str, Any]]],
    images: dict[int, int],
    clip: LabelledClip,
    part: Part,
    ids: tuple[int, int],
) -> None:
    """One track and its annotations; `ids` are those of video and category."""
    video, category = ids
    track = len(tables["tracks"]) + 1
    tables["tracks"].append(
        {
            "id": track,
            "video_id": video,
            "category_id": category,
            "first_frame": part.track.first,
            "stop_frame": part.track.stop,
            "severity": part.severity,
            "why": part.why,
            "note": part.note,
        }
    )
    for frame, (x1, y1, x2, y2) in part.track.keyframes:
        if frame not in images:
            images[frame] = len(tables["images"]) + 1
            tables["images"].append(
                {
                    "id": images[frame],
                    "video_id": video,
                    "frame_index": frame,
                    "file_name": f"{clip.path}/{frame:06}.png",
                    "width": clip.width,
                    "height": clip.height,
                }
            )
        wide, high = (x2 - x1) * clip.width, (y2 - y1) * clip.height
        tables["annotations"].append(
            {
                "id": len(tables["annotations"]) + 1,
                "image_id": images[frame],
                "video_id": video,
                "track_id": track,
                "category_id": category,
                "bbox": [x1 * clip.width, y1 * clip.height, wide, high],
                "area": wide * high,
                "segmentation": [],  # Boxes only; readers of COCO want the field all the same.
                "iscrowd": 0,
            }
        )


class _Reading:
    """The tables of one file; what is wrong is collected while they are gone through."""

    def __init__(self, plain: object, fps: float | None, check: Callable[[object], None]) -> None:
        self.faults: list[CocoFault] = []
        self.check = check
        self.broken: set[object] = set()
        """Ids of videos that are left out."""
        self.images: dict[Any, Mapping[str, Any]] = {}
        self.videos = self._table(plain, "videos", "name", "width", "height", "num_frames")
        self.clips: dict[object, LabelledClip] = {}
        for key, row in self.videos.items():
            with self._entry("videos", row):
                self.clips[key] = _clip(row, fps)
        self.images = self._table(plain, "images", "video_id", "frame_index")
        self._check_of_videos("images", self.images, _check_image)
        categories = self._table(plain, "categories", "name")
        self.names = {key: str(row["name"]) for key, row in categories.items()}
        self.tracks: dict[Any, Mapping[str, Any]] | None = None
        if isinstance(plain, Mapping) and "tracks" in plain:
            self.tracks = self._table(plain, "tracks", "video_id")
            self._check_of_videos("tracks", self.tracks, _check_track)
        self.boxes = self._table(plain, "annotations", "image_id", "category_id", "bbox")

    def outcomes(self) -> list[LabelledClip | CocoFault]:
        """Every fault, then clips in the order of their videos."""
        drawn: dict[object, dict[object, list[_Drawn]]] = {key: {} for key in self.clips}
        for key, row in self.boxes.items():
            with self._entry("annotations", row):
                image = _find(self.images, row["image_id"], "image_id")
                video, track = image["video_id"], row.get("track_id")
                if video in self.broken or video not in self.clips:
                    continue
                _find(self.names, row["category_id"], "category_id")
                if track is not None and self.tracks is not None:
                    _find(self.tracks, track, "track_id")
                one = _Drawn(image["frame_index"], _corners(key, row, self.clips[video]), row)
                place = ("lone", key) if track is None else ("track", track)
                drawn[video].setdefault(place, []).append(one)
        clips = []
        for key, clip in self.clips.items():
            if key not in self.broken:
                with self._entry("videos", self.videos[key]):
                    clips.append(self._labelled(clip, drawn[key]))
        return [*self.faults, *(one for one in clips if one is not None)]

    def _check_of_videos(
        self,
        table: str,
        rows: Mapping[Any, Mapping[str, Any]],
        check: Callable[[Mapping[str, Any], LabelledClip], None],
    ) -> None:
        """Whether each row fits its video; those of a video that is left out are not looked at."""
        for row in rows.values():
            with self._entry(table, row):
                if not isinstance(row["video_id"], int | str) or row["video_id"] not in self.broken:
                    check(row, _find(self.clips, row["video_id"], "video_id"))

    def _labelled(
        self, clip: LabelledClip, drawn: Mapping[Any, Sequence[_Drawn]]
    ) -> LabelledClip | None:
        """A clip with what is drawn in it; None, and a fault, where a box of it is none."""
        parts = []
        for (kind, key), boxes in drawn.items():
            track = {} if kind == "lone" or self.tracks is None else self.tracks[key]
            parts.append(_part(boxes, track, self.names[boxes[0].row["category_id"]]))
        try:
            return LabelledClip(**{**vars(clip), "findings": findings_of(parts, clip)})
        except ValueError:
            count = len(self.faults)
            for one in (one for boxes in drawn.values() for one in boxes):
                with self._entry("annotations", one.row):
                    make_box(0.0, one.corners)
            if len(self.faults) == count:
                raise
            return None

    def _table(self, plain: object, name: str, *entries: str) -> dict[Any, Mapping[str, Any]]:
        """Rows of a table by their id, each with these entries; two of one id are no row."""
        rows = get(plain, name, "COCO file")
        if not isinstance(rows, list):
            raise ValueError(f"{name} must be a list, got {type(rows).__name__}")
        found: dict[Any, Mapping[str, Any]] = {}
        twice = set()
        for number, row in enumerate(rows):
            known = {**row, _ROW: number} if isinstance(row, dict) else {_ROW: number}
            with self._entry(name, known):
                for entry in ("id", *entries):
                    get(row, entry, f"entry of {name}")
                self.check(row)
                key = row["id"]
                if isinstance(key, bool) or not isinstance(key, int | str):
                    raise ValueError(f"id must be a number or text, got {key!r}")
                if key in found:
                    twice.add(key)
                    self.broken.add(self._video_of(name, found[key]))
                    raise ValueError(f"{name} must have different ids, got {key!r} twice")
                found[key] = known
        return {key: row for key, row in found.items() if key not in twice}

    @contextmanager
    def _entry(self, table: str, row: Mapping[str, Any]) -> Iterator[None]:
        """Inside this context an error is a fault of this row, and its video is left out."""
        try:
            with reading(f"entry of {table}"):
                yield
        except ValueError as error:
            self.faults.append(CocoFault(table, row[_ROW], str(error)))
            self.broken.add(self._video_of(table, row))

    def _video_of(self, table: str, row: Mapping[str, Any]) -> object:
        """The id of the video that a row belongs to, as far as it says; else None."""
        key, image = row.get("id" if table == "videos" else "video_id"), row.get("image_id")
        if isinstance(image, int | str) and image in self.images:
            key = self.images[image]["video_id"]
        return key if isinstance(key, int | str) else None


@dataclass(frozen=True)
class _Drawn:
    """One box on one frame."""

    frame: int
    corners: Corners
    row: Mapping[str, Any]


def _corners(key: object, row: Mapping[str, Any], clip: LabelledClip) -> Corners:
    x, y, wide, high = _numbers(f"bbox of annotation {key}", row["bbox"], 4)
    return x / clip.width, y / clip.height, (x + wide) / clip.width, (y + high) / clip.height


def _part(boxes: Sequence[_Drawn], track: Mapping[str, Any], name: str) -> Part:
    keyframes = sorted((one.frame, one.corners) for one in boxes)
    first = track.get("first_frame", keyframes[0][0])
    stop = track.get("stop_frame", keyframes[-1][0] + 1)
    shown = Track(first, stop, tuple(keyframes))
    return Part(
        shown, name, track.get("severity", 2), str(track.get("why", "")), str(track.get("note", ""))
    )


def _clip(video: Mapping[str, Any], fps: float | None) -> LabelledClip:
    if fps is None and "fps" not in video:
        raise ValueError(
            "fps must be stated by the video or given, got none; 'annotate import' takes --fps"
        )
    names = ("width", "height", "num_frames")
    rate = video["fps"] if fps is None else fps
    return LabelledClip(path=video["name"], fps=rate, **{name: video[name] for name in names})


def _check_image(image: Mapping[str, Any], clip: LabelledClip) -> None:
    _check_frame("frame_index", image["frame_index"], clip, clip.num_frames - 1)


def _check_track(track: Mapping[str, Any], clip: LabelledClip) -> None:
    first, stop = track.get("first_frame", 0), track.get("stop_frame", clip.num_frames)
    _check_frame("first_frame", first, clip, clip.num_frames - 1)
    _check_frame("stop_frame", stop, clip, clip.num_frames)
    if first >= stop:
        raise ValueError(f"first_frame must be before stop_frame, got {first} and {stop}")


def _check_frame(name: str, frame: object, clip: LabelledClip, last: int) -> None:
    if isinstance(frame, bool) or not isinstance(frame, int) or not 0 <= frame <= last:
        raise ValueError(
            f"{name} must be a whole number from 0 to {last} in {clip.path} of "
            f"{clip.num_frames} frames, got {frame!r}"
        )


def _find(rows: Mapping[Any, Any], key: object, name: str) -> Any:
    if not isinstance(key, int | str) or key not in rows:
        raise ValueError(f"{name} must be in its table, got {key!r}")
    return rows[key]


def _numbers(name: str, value: object, count: int) -> list[float]:
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    if not isinstance(value, list) or not numbers or len(value) != count:
        raise ValueError(f"{name} must be {count} numbers, got {value!r}")
    return [float(one) for one in value]
