"""FiftyOne's samples as JSON: temporal detections on the clip, detections on each of its frames.

Load them, with FiftyOne installed, by

    dataset = fo.Dataset("cac")
    dataset.add_samples([fo.Sample.from_dict(one) for one in json.load(open("samples.json"))])

and write them anew by `json.dump([one.to_dict(include_frames=True) for one in dataset], ...)`.

Source: fiftyone.core.sample.Sample.from_dict and fiftyone.core.labels of FiftyOne 1.22.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cac_reward.exports.base import (
    WHOLE_FRAME,
    Corners,
    LabelledClip,
    frame_span,
    get,
    make_box,
    printable,
    read_note,
    reading,
    same_box,
    with_words,
    write_note,
)
from cac_reward.report import Box, Finding, TimeWindow

FIELD = "findings"

_Drawn = list[tuple[int, Corners]]


def write_fiftyone(clips: Sequence[LabelledClip]) -> str:
    """Write clips as a JSON list of samples; FiftyOne counts frames from 1."""
    return json.dumps([_sample(clip) for clip in clips], indent=1, allow_nan=False)


def read_fiftyone(text: str) -> list[LabelledClip]:
    """Read what `write_fiftyone` wrote, or FiftyOne from it.

    Detections on frames belong to the temporal detection with their `finding`; those without one
    become findings of one frame.

    Raises:
        ValueError: If an entry is missing or has another form.
    """
    with reading("FiftyOne file"):
        return _read(text)


def _sample(clip: LabelledClip) -> dict[str, Any]:
    frames: dict[int, list[dict[str, Any]]] = {}
    temporal = []
    for number, finding in enumerate(clip.findings):
        span = frame_span(finding, clip)
        kind = printable(finding.type)
        temporal.append(
            {
                "_cls": "TemporalDetection",
                "tags": [],
                "label": kind,
                "support": [span.start + 1, span.stop],
                "finding": number,
                "severity": finding.severity,
                "why": printable(finding.why),
                "note": write_note(number, finding),
            }
        )
        for frame, (x1, y1, x2, y2) in _drawn(finding, clip):
            frames.setdefault(frame, []).append(
                {
                    "_cls": "Detection",
                    "tags": [],
                    "label": kind,
                    "bounding_box": [x1, y1, x2 - x1, y2 - y1],
                    "finding": number,
                }
            )
    return {
        "filepath": clip.path,
        "_media_type": "video",
        "tags": [],
        "metadata": {
            "_cls": "VideoMetadata",
            "frame_width": clip.width,
            "frame_height": clip.height,
            "frame_rate": clip.fps,
            "total_frame_count": clip.num_frames,
            "duration": clip.num_frames / clip.fps,
        },
        FIELD: {"_cls": "TemporalDetections", "detections": temporal},
        "frames": {
            str(frame + 1): {
                "frame_number": frame + 1,
                FIELD: {"_cls": "Detections", "detections": detections},
            }
            for frame, detections in sorted(frames.items())
        },
    }


def _drawn(finding: Finding, clip: LabelledClip) -> _Drawn:
    """The boxes that are shown on each frame of a finding; none where its place is not known."""
    return [
        (frame, box.coordinates)
        for frame in frame_span(finding, clip)
        for box in finding.boxes_at(frame / clip.fps)
    ]


def _clip(sample: object) -> LabelledClip:
    path = str(get(sample, "filepath", "sample"))
    where = f"sample {path}"
    metadata = get(sample, "metadata", where)
    names = {
        "width": "frame_width",
        "height": "frame_height",
        "fps": "frame_rate",
        "num_frames": "total_frame_count",
    }
    values = {ours: get(metadata, theirs, f"metadata of {path}") for ours, theirs in names.items()}
    clip = LabelledClip(path=path, **values)  # type: ignore[arg-type]  # checked by LabelledClip
    assert isinstance(sample, Mapping)
    boxes: dict[object, list[tuple[int, Corners, Mapping[str, Any]]]] = {}
    for key, frame in (sample.get("frames") or {}).items():
        for one in _detections(frame, path):
            left, top, wide, high = _numbers(get(one, "bounding_box", f"detection of {path}"))
            place = (int(key) - 1, (left, top, left + wide, top + high), one)
            boxes.setdefault(one.get("finding"), []).append(place)
    findings = []
    for one in sorted(_detections(sample, path), key=lambda one: one.get("finding", 1 << 30)):
        drawn = [place[:2] for place in boxes.pop(one.get("finding", "none"), [])]
        findings.append(_finding(one, drawn, clip))
    for rest in boxes.values():
        findings += [
            _lone(frame, corners, str(one.get("label")), clip) for frame, corners, one in rest
        ]
    return LabelledClip(**{**vars(clip), "findings": tuple(findings)})


def _finding(one: Mapping[str, Any], drawn: _Drawn, clip: LabelledClip) -> Finding:
    where = f"temporal detection of {clip.path}"
    kind = str(get(one, "label", where))
    first, last = (int(number) for number in _numbers(get(one, "support", where), 2))
    severity, why = one.get("severity", 2), one.get("why") or ""
    drawn = sorted(drawn)
    if one.get("note"):
        _, noted = read_note(one["note"])
        span = frame_span(noted, clip)
        ours = sorted(_drawn(noted, clip))
        if (span.start + 1, span.stop) == (first, last) and _same(ours, drawn, clip):
            return with_words(noted, kind, severity, why)
    boxes: list[Box] = [make_box(frame / clip.fps, corners) for frame, corners in drawn]
    if all(same_box(corners, WHOLE_FRAME, clip) for _, corners in drawn):
        boxes = []
    window = TimeWindow((first - 1) / clip.fps, last / clip.fps)
    return Finding(kind, window, tuple(boxes), severity, why)


def _lone(frame: int, corners: Corners, kind: str, clip: LabelledClip) -> Finding:
    window = TimeWindow(frame / clip.fps, (frame + 1) / clip.fps)
    return Finding(kind, window, (make_box(frame / clip.fps, corners),))


def _same(ours: _Drawn, theirs: _Drawn, clip: LabelledClip) -> bool:
    return len(ours) == len(theirs) and all(
        a == b and same_box(one, other, clip)
        for (a, one), (b, other) in zip(ours, theirs, strict=True)
    )


def _detections(owner: object, path: str) -> list[Mapping[str, Any]]:
    """Detections of a sample or a frame; none where it has none."""
    field = owner.get(FIELD) if isinstance(owner, Mapping) else None
    if field is None:
        return []
    found = get(field, "detections", f"{FIELD} of {path}")
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"detections of {path} must be a list of objects, got {found!r}")
    return found


def _numbers(value: object, count: int = 4) -> list[float]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != count
        or not all(isinstance(one, int | float) for one in value)
    ):
        raise ValueError(f"box or support must be {count} numbers, got {value!r}")
    return [float(one) for one in value]


def _read(text: str) -> list[LabelledClip]:
    samples = json.loads(text)
    if not isinstance(samples, list):
        raise ValueError(f"FiftyOne file must be a list of samples, got {type(samples).__name__}")
    return [_clip(sample) for sample in samples]
