"""COCO's JSON for videos: boxes in pixels on frames, joined to tracks and videos as in TAO.

`images` are single frames (extract them to `file_name`, or use `video_id` and `frame_index`), so
that tools for pictures read the file too. Windows, reasons and severity are with the tracks.

Source: https://cocodataset.org/#format-data; `videos` and `tracks` as in TAO's annotations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cac_reward.exports.base import (
    Corners,
    LabelledClip,
    Part,
    Track,
    findings_of,
    get,
    parts_of,
    reading,
)

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


def read_coco(text: str) -> list[LabelledClip]:
    """Read what `write_coco` wrote, or other COCO files with `videos` that state their rate.

    An annotation without a track becomes a finding of one frame.

    Raises:
        ValueError: If a table or an entry is missing or has another form.
    """
    with reading("COCO file"):
        return _read(text)


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


def _part(
    boxes: Sequence[tuple[int, Mapping[str, Any]]],
    track: Mapping[str, Any],
    clip: LabelledClip,
    name: str,
) -> Part:
    keyframes = []
    for frame, one in boxes:
        x, y, wide, high = _numbers(f"bbox of annotation {one['key']}", one["bbox"], 4)
        corners: Corners = (
            x / clip.width,
            y / clip.height,
            (x + wide) / clip.width,
            (y + high) / clip.height,
        )
        keyframes.append((frame, corners))
    keyframes.sort()
    first = track.get("first_frame", keyframes[0][0])
    stop = track.get("stop_frame", keyframes[-1][0] + 1)
    shown = Track(first, stop, tuple(keyframes))
    return Part(
        shown, name, track.get("severity", 2), str(track.get("why", "")), str(track.get("note", ""))
    )


def _clip(video: Mapping[str, Any]) -> LabelledClip:
    names = ("width", "height", "fps", "num_frames")
    return LabelledClip(path=video["name"], **{name: video[name] for name in names})


def _table(plain: object, name: str, *entries: str) -> dict[Any, Mapping[str, Any]]:
    """Rows of a table by their id, each with these entries."""
    rows = get(plain, name, "COCO file")
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list, got {type(rows).__name__}")
    found: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        for entry in ("id", *entries):
            get(row, entry, f"entry of {name}")
        if row["id"] in found:
            raise ValueError(f"{name} must have different ids, got {row['id']!r} twice")
        found[row["id"]] = row
    return found


def _find(rows: Mapping[Any, Any], key: object, name: str) -> Any:
    if key not in rows:
        raise ValueError(f"{name} must be in its table, got {key!r}")
    return rows[key]


def _numbers(name: str, value: object, count: int) -> list[float]:
    numbers = isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    if not isinstance(value, list) or not numbers or len(value) != count:
        raise ValueError(f"{name} must be {count} numbers, got {value!r}")
    return [float(one) for one in value]


def _read(text: str) -> list[LabelledClip]:
    plain = json.loads(text)
    videos = _table(plain, "videos", "name", "width", "height", "fps", "num_frames")
    images = _table(plain, "images", "video_id", "frame_index")
    names = {key: str(one["name"]) for key, one in _table(plain, "categories", "name").items()}
    tracks = _table(plain, "tracks", "video_id") if "tracks" in plain else {}
    drawn: dict[Any, list[tuple[int, Mapping[str, Any]]]] = {}
    for key, one in _table(plain, "annotations", "image_id", "category_id", "bbox").items():
        image = _find(images, one["image_id"], "image_id")
        track = one.get("track_id")
        place = ("lone", key) if track is None else (image["video_id"], track)
        drawn.setdefault(place, []).append((image["frame_index"], {**one, **image, "key": key}))
    parts: dict[Any, list[Part]] = {}
    clips = {key: _clip(one) for key, one in videos.items()}
    for (kind, key), boxes in drawn.items():
        track = {} if kind == "lone" else _find(tracks, key, "track_id")
        video = boxes[0][1]["video_id"]
        clip = _find(clips, video, "video_id")
        name = _find(names, boxes[0][1]["category_id"], "category_id")
        parts.setdefault(video, []).append(_part(boxes, track, clip, name))
    return [
        LabelledClip(**{**vars(clip), "findings": findings_of(parts.get(key, []), clip)})
        for key, clip in clips.items()
    ]
