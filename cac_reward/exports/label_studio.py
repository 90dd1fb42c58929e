"""Label Studio's tasks: a video with tracked rectangles, as predictions that a person corrects.

Source: https://labelstud.io/tags/videorectangle (a `sequence` of keyframes in percent, frames from
1, `enabled` off where a rectangle ends).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

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

_CLIP = ("width", "height", "fps", "num_frames")


def write_label_studio(clips: Sequence[LabelledClip]) -> str:
    """Write clips as a JSON list of tasks, to be imported into a project with `labelling_page`.

    `data.video` is the path as it is; Label Studio opens addresses only, so serve the files and
    put their address there, for example `/data/local-files/?d=clips/a.mp4`.
    """
    tasks = [
        {
            "data": {
                "video": clip.path,
                "path": clip.path,
                **{name: getattr(clip, name) for name in _CLIP},
            },
            "predictions": [
                {
                    "model_version": "cac-reward",
                    "result": [
                        _region(number, part, clip) for number, part in enumerate(parts_of(clip))
                    ],
                }
            ],
        }
        for clip in clips
    ]
    return json.dumps(tasks, indent=1, allow_nan=False)


def labelling_page(clips: Sequence[LabelledClip]) -> str:
    """The labelling configuration (XML) of a project for these tasks."""
    types = sorted({part.type for clip in clips for part in parts_of(clip)})
    labels = "".join(f"    <Label value={quoteattr(one)}/>\n" for one in types)
    rates = {clip.fps for clip in clips}
    rate = f' frameRate="{rates.pop():g}"' if len(rates) == 1 else ' frameRate="$fps"'
    return (
        f'<View>\n  <Video name="video" value="$video"{rate}/>\n'
        '  <VideoRectangle name="box" toName="video"/>\n'
        f'  <Labels name="type" toName="video">\n{labels}  </Labels>\n</View>\n'
    )


def read_label_studio(text: str) -> list[LabelledClip]:
    """Read what `write_label_studio` wrote, or Label Studio's JSON export of it.

    A person's last annotation counts before the prediction. The reason of a finding is the text
    of its region, the severity its `meta`.

    Raises:
        ValueError: If an entry is missing or has another form.
    """
    with reading("Label Studio file"):
        return _read(text)


def _region(number: int, part: Part, clip: LabelledClip) -> dict[str, Any]:
    track = part.track
    last = track.keyframes[-1][0]
    assert last == track.stop - 1
    return {
        "id": f"track{number}",
        "type": "videorectangle",
        "from_name": "box",
        "to_name": "video",
        "original_width": clip.width,
        "original_height": clip.height,
        "meta": {"text": [part.why], "severity": part.severity, "note": part.note},
        "value": {
            "labels": [part.type],
            "framesCount": clip.num_frames,
            "duration": clip.num_frames / clip.fps,
            "sequence": [
                {
                    "frame": frame + 1,
                    "time": frame / clip.fps,
                    "enabled": frame != last,
                    "rotation": 0,
                    "x": 100 * x1,
                    "y": 100 * y1,
                    "width": 100 * (x2 - x1),
                    "height": 100 * (y2 - y1),
                }
                for frame, (x1, y1, x2, y2) in track.keyframes
            ],
        },
    }


def _part(region: Mapping[str, Any], clip: LabelledClip) -> Part:
    where = f"region of {clip.path}"
    value = get(region, "value", where)
    sequence, labels = get(value, "sequence", where), get(value, "labels", where)
    if not isinstance(sequence, list) or not sequence or not isinstance(labels, list) or not labels:
        raise ValueError(f"{where} must have a sequence and a label, got {sequence!r}, {labels!r}")
    keyframes = []
    for one in sequence:
        names = ("frame", "x", "y", "width", "height")
        numbers = [get(one, name, f"sequence of {clip.path}") for name in names]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"sequence of {clip.path} must hold numbers, got {numbers}")
        frame, x, y, wide, high = numbers
        if one.get("rotation"):
            raise ValueError(
                f"rectangles of {clip.path} must be upright, got rotation {one['rotation']}; "
                "draw an upright one around it"
            )
        corners: Corners = (x / 100, y / 100, (x + wide) / 100, (y + high) / 100)  # type: ignore
        keyframes.append((int(frame) - 1, corners))  # type: ignore[call-overload]
    keyframes.sort()
    # Without an end a rectangle stays to the end of the clip.
    stop = clip.num_frames if sequence[-1].get("enabled", True) else keyframes[-1][0] + 1
    meta = region.get("meta") or {}
    texts = meta.get("text") or [""]
    return Part(
        Track(keyframes[0][0], stop, tuple(keyframes)),
        str(labels[0]),
        meta.get("severity", 2),
        texts if isinstance(texts, str) else "\n".join(map(str, texts)),
        str(meta.get("note", "")),
    )


def _read(text: str) -> list[LabelledClip]:
    tasks = json.loads(text)
    if not isinstance(tasks, list):
        raise ValueError(f"Label Studio file must be a list of tasks, got {type(tasks).__name__}")
    clips = []
    for task in tasks:
        data = get(task, "data", "task")
        values = {name: get(data, name, "data of a task") for name in ("path", *_CLIP)}
        clip = LabelledClip(**values)  # type: ignore[arg-type]  # checked by LabelledClip
        answers = task.get("annotations") or task.get("predictions") or [{"result": []}]
        regions = get(answers[-1], "result", f"annotation of {clip.path}")
        parts = [
            _part(region, clip)
            for region in regions  # type: ignore[attr-defined]
            if get(region, "type", f"region of {clip.path}") == "videorectangle"
        ]
        clips.append(LabelledClip(**{**vars(clip), "findings": findings_of(parts, clip)}))
    return clips
