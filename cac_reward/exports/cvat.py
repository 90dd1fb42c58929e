"""CVAT's XML for video (1.1): one file for each clip, one track for each box of a finding.

CVAT keeps no rate of a video and only the last part of its name; both are in a part of the file
that it skips, and are asked for again when it has written the file anew.

Source: cvat/apps/dataset_manager/formats/cvat.py of cvat-ai/cvat (reads `track`, `box` with
`keyframe`, `outside` and `attribute`s inside the box).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement, TreeBuilder
from xml.parsers import expat

from cac_reward.exports.base import (
    Corners,
    EntryError,
    LabelledClip,
    Part,
    Track,
    findings_of,
    parts_of,
    printable,
    reading,
    same_box,
)
from cac_reward.report import SEVERITIES

ATTRIBUTES = ("severity", "why", "cac_note")
WITH_POINTS = ("polygon", "polyline", "points")
"""Shapes that are read as the box around them."""


def write_cvat(clip: LabelledClip) -> str:
    """Write one clip as an XML text for CVAT's `CVAT for video 1.1` (or `CVAT 1.1`) upload.

    The task in CVAT must have labels of the findings' types, with the attributes `ATTRIBUTES`;
    the `labels` of this file show them.
    """
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    root.append(_meta(clip))
    for number, part in enumerate(parts_of(clip)):
        track = SubElement(root, "track", id=str(number), label=part.type, source="manual")
        last: Corners = part.track.keyframes[-1][1]
        for frame, corners in part.track.keyframes:
            _add_box(track, frame, corners, clip, part)
        if part.track.stop < clip.num_frames:
            _add_box(track, part.track.stop, last, clip, part, outside=True)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def read_cvat(text: str, *, path: str | None = None, fps: float | None = None) -> LabelledClip:
    """Read what `write_cvat` or CVAT's export `CVAT for video 1.1` wrote.

    Args:
        text: The XML.
        path: Of the video; else ours, else the name that CVAT keeps as the task's source.
        fps: Frames per second; needed where CVAT wrote the file.

    Raises:
        EntryError: If something is drawn that is no box and has no points, or is not as documented.
        ValueError: If it is no such file, or path or rate are not known.
    """
    with reading("CVAT file"):
        return _read(text, path, fps)


def _meta(clip: LabelledClip) -> Element:
    meta = Element("meta")
    task = SubElement(meta, "task")
    for name, value in (
        ("name", clip.path),
        ("size", clip.num_frames),
        ("mode", "interpolation"),
        ("start_frame", 0),
        ("stop_frame", clip.num_frames - 1),
    ):
        SubElement(task, name).text = str(value)
    size = SubElement(task, "original_size")
    SubElement(size, "width").text = str(clip.width)
    SubElement(size, "height").text = str(clip.height)
    labels = SubElement(task, "labels")
    choices = "\n".join(map(str, SEVERITIES))
    for kind in sorted({printable(finding.type) for finding in clip.findings}):
        label = SubElement(labels, "label")
        SubElement(label, "name").text = kind
        attributes = SubElement(label, "attributes")
        for name, sort, default, values in (
            ("severity", "select", "2", choices),
            ("why", "text", "", ""),
            ("cac_note", "text", "", ""),
        ):
            attribute = SubElement(attributes, "attribute")
            SubElement(attribute, "name").text = name
            SubElement(attribute, "mutable").text = "False"
            SubElement(attribute, "input_type").text = sort
            SubElement(attribute, "default_value").text = default
            SubElement(attribute, "values").text = values
    SubElement(meta, "cac", path=clip.path, fps=repr(clip.fps))
    return meta


def _add_box(
    track: Element,
    frame: int,
    corners: Corners,
    clip: LabelledClip,
    part: Part,
    outside: bool = False,
) -> None:
    sides = (clip.width, clip.height) * 2
    pixels = [repr(one * side) for one, side in zip(corners, sides, strict=True)]
    places = dict(zip(("xtl", "ytl", "xbr", "ybr"), pixels, strict=True))
    box = SubElement(
        track,
        "box",
        {
            "frame": str(frame),
            "keyframe": "1",
            "outside": str(int(outside)),
            "occluded": "0",
            **places,
            "z_order": "0",
        },
    )
    for name, value in zip(ATTRIBUTES, (str(part.severity), part.why, part.note), strict=True):
        SubElement(box, "attribute", name=name).text = value


@dataclass(frozen=True)
class _Shown:
    """A shape of a track."""

    frame: int
    corners: Corners
    outside: bool
    """Whether it is off the screen from here on."""


def _part(track: Element, clip: LabelledClip) -> Part | None:
    """A track as drawn at its keyframes; None where it is never on screen."""
    keys: list[_Shown] = []
    others: dict[int, Corners] = {}
    for shape in track:
        if shape.tag == "attribute":
            continue
        frame = round(_number(shape, "frame"))
        outside = shape.get("outside") == "1"
        if shape.get("keyframe") == "1":
            keys.append(_Shown(frame, _corners(shape, clip), outside))
        elif not outside:
            others[frame] = _corners(shape, clip)
    keys.sort(key=lambda one: one.frame)
    keyframes = tuple((one.frame, one.corners) for one in keys if not one.outside)
    if not keyframes:
        return None
    stop = next(
        (one.frame for one in keys if one.outside and one.frame > keyframes[-1][0]),
        clip.num_frames,
    )
    said = {one.get("name"): one.text or "" for one in track.iter("attribute")}
    told = said.get("severity") or "2"
    if not told.isdecimal():
        raise _fault(track, f"severity of {_name(track)} must be a number, got {told!r}")
    return Part(
        Track(keyframes[0][0], stop, keyframes, _between(keys, others, clip)),
        _attribute(track, "label"),
        int(told),
        said.get("why", ""),
        said.get("cac_note", ""),
    )


def _between(
    keys: Sequence[_Shown], others: Mapping[int, Corners], clip: LabelledClip
) -> tuple[tuple[int, Corners], ...]:
    """What CVAT shows between keyframes: as it wrote it, else on straight lines."""
    found: list[tuple[int, Corners]] = []
    end = _Shown(clip.num_frames, keys[-1].corners, True)
    for one, following in zip(keys, [*keys[1:], end], strict=True):
        if one.outside:
            continue
        still = same_box(one.corners, following.corners, clip)
        for frame in range(one.frame + 1, following.frame):
            corners = others.get(frame)
            if corners is None and not still:
                share = (frame - one.frame) / (following.frame - one.frame)
                pairs = zip(one.corners, following.corners, strict=True)
                x1, y1, x2, y2 = (a + (b - a) * share for a, b in pairs)
                corners = x1, y1, x2, y2
            # What stands still is held from the keyframes.
            if corners is not None and not (still and same_box(corners, one.corners, clip)):
                found.append((frame, corners))
    return tuple(found)


def _corners(shape: Element, clip: LabelledClip) -> Corners:
    """The box of a shape, relative to the frame; around its points where it is none itself."""
    if shape.tag == "box":
        if shape.get("rotation") is not None and _number(shape, "rotation") % 360:
            turned = shape.get("rotation")
            raise _fault(
                shape, f"{_name(shape)} must be upright, got rotation {turned}; draw it so"
            )
        x1, y1, x2, y2 = (_number(shape, name) for name in ("xtl", "ytl", "xbr", "ybr"))
    elif shape.tag in WITH_POINTS:
        xs, ys = zip(*_points(shape), strict=True)
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
        if not (x1 < x2 and y1 < y2):
            got = _attribute(shape, "points")[:80]
            raise _fault(shape, f"{_name(shape)} must have an area, got {got!r}; draw a box")
    else:
        known = ", ".join(("box", *WITH_POINTS))
        raise _fault(
            shape, f"shape must be one of {known}, got {_name(shape)}; draw a box in its place"
        )
    return x1 / clip.width, y1 / clip.height, x2 / clip.width, y2 / clip.height


def _points(shape: Element) -> list[tuple[float, float]]:
    text = _attribute(shape, "points")
    found = re.findall(r"(-?[0-9]+(?:\.[0-9]*)?),(-?[0-9]+(?:\.[0-9]*)?)(?:;|$)", text)
    if not found or len(found) != text.count(";") + 1:
        raise _fault(shape, f"points of {_name(shape)} must be x,y;x,y, got {text[:80]!r}")
    return [(float(x), float(y)) for x, y in found]


def _known(name: str, given: object, ours: Element | None, source: str | None = None) -> str:
    value = given if given is not None else None if ours is None else ours.get(name)
    if value is None and source:
        return source
    if value is None:
        raise ValueError(
            f"{name} must be given for a file that CVAT wrote, which does not keep it, got None"
        )
    return str(value)


def _text(root: Element, name: str) -> str:
    found = root.find(f"meta//{name}")
    if found is None or not (found.text or "").isdecimal():
        raise ValueError(
            f"CVAT file must state the video's {name} as a number, got "
            f"{None if found is None else found.text!r}; export it as 'CVAT for video 1.1'"
        )
    return str(found.text)


def _attribute(element: Element, name: str) -> str:
    value = element.get(name)
    if value is None:
        raise _fault(
            element, f"{_name(element)} must have the attribute {name!r}, got {element.attrib}"
        )
    return value


class _Placed(Element):
    """An element that knows where it begins."""

    line = 0
    column = 0


def _parse(text: str) -> Element:
    """The root of an XML text, whose elements know their line and column.

    Raises:
        ValueError: If it is not XML, or has a document type.
    """
    parser = expat.ParserCreate()
    builder = TreeBuilder(element_factory=_Placed)

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = builder.start(tag, attributes)
        assert isinstance(element, _Placed)
        element.line, element.column = parser.CurrentLineNumber, parser.CurrentColumnNumber + 1

    def refuse(*declared: object) -> None:
        raise ValueError(
            f"CVAT file must have no document type, got one in line {parser.CurrentLineNumber}; "
            "CVAT writes none"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise ValueError(f"CVAT file must be XML, got {text[:80]!r}: {error}") from error
    return builder.close()


def _number(element: Element, name: str) -> float:
    """A number in an attribute."""
    value = _attribute(element, name)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _fault(element, f"{name} of {_name(element)} must be a number, got {value!r}")
    return number


def _name(element: Element) -> str:
    assert isinstance(element, _Placed)
    return f"{element.tag} (line {element.line}, column {element.column})"


def _fault(element: Element, why: str) -> EntryError:
    assert isinstance(element, _Placed)
    return EntryError(why, element.line, str(element.column))


def _read(text: str, path: str | None, fps: float | None) -> LabelledClip:
    root = _parse(text)
    ours = root.find("meta/cac")
    clip = LabelledClip(
        path=_known("path", path, ours, root.findtext("meta//source")),
        width=int(_text(root, "width")),
        height=int(_text(root, "height")),
        fps=float(_known("fps", fps, ours)),
        num_frames=int(_text(root, "size")),
    )
    for element in root:
        if element.tag not in ("version", "meta", "track"):
            raise _fault(
                element,
                f"{_name(element)} must be a track, got another entry; export the task as 'CVAT "
                "for video 1.1'",
            )
    parts = [_part(track, clip) for track in root.iter("track")]
    try:
        findings = findings_of([part for part in parts if part is not None], clip)
    except ValueError as error:
        raise EntryError(str(error)) from error
    return LabelledClip(**{**vars(clip), "findings": findings})
