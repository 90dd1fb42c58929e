"""ActivityNet's JSON: a segment in seconds for each finding, and its boxes as an entry of ours.

Source: the layout of activity_net.v1-3 (`database` -> name -> `duration`, `resolution`,
`annotations` of `label` and `segment`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cac_reward.exports.base import LabelledClip, get, reading
from cac_reward.report import Finding

VERSION = "cac-reward 1"


def write_activitynet(clips: Sequence[LabelledClip]) -> str:
    """Write clips as one JSON text; a clip goes by its path."""
    database = {
        clip.path: {
            "duration": clip.num_frames / clip.fps,
            "resolution": f"{clip.width}x{clip.height}",
            "fps": clip.fps,
            "num_frames": clip.num_frames,
            "subset": "validation",
            "annotations": [_annotation(finding) for finding in clip.findings],
        }
        for clip in clips
    }
    if len(database) != len(clips):
        raise ValueError("clips must have different paths, got one twice")
    plain = {"version": VERSION, "taxonomy": [], "database": database}
    return json.dumps(plain, indent=1, allow_nan=False)


def read_activitynet(text: str) -> list[LabelledClip]:
    """Read what `write_activitynet` wrote, or what others wrote with `fps` and `resolution`.

    Segments without boxes, severity and why become findings without boxes, of severity 2.

    Raises:
        ValueError: If an entry is missing or has another form.
    """
    with reading("ActivityNet file"):
        database = get(json.loads(text), "database", "ActivityNet file")
        return [_clip(path, entry) for path, entry in database.items()]  # type: ignore[attr-defined]


def _annotation(finding: Finding) -> dict[str, object]:
    plain = finding.to_json()
    label, segment = plain.pop("type"), plain.pop("window")
    return {"label": label, "segment": segment, **plain}


def _clip(path: str, entry: object) -> LabelledClip:
    where = f"entry of {path}"
    width, _, height = str(get(entry, "resolution", where)).partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"resolution of {path} must be WIDTHxHEIGHT, got {width}x{height}")
    fps: Any = get(entry, "fps", where)
    num_frames: Any = entry.get("num_frames")  # type: ignore[attr-defined]
    if num_frames is None:
        num_frames = round(get(entry, "duration", where) * fps)  # type: ignore[operator]
    annotations: Any = get(entry, "annotations", where)
    return LabelledClip(
        path=path,
        width=int(width),
        height=int(height),
        fps=fps,
        num_frames=num_frames,
        findings=tuple(_finding(one, path) for one in annotations),
    )


def _finding(plain: Mapping[str, object], path: str) -> Finding:
    where = f"annotation of {path}"
    return Finding.from_json(
        {
            "type": get(plain, "label", where),
            "window": get(plain, "segment", where),
            "boxes": plain.get("boxes", []),
            "severity": plain.get("severity", 2),
            "why": plain.get("why", ""),
        }
    )
