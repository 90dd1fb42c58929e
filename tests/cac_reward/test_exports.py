"""Findings go out to annotation tools and come back: exactly, or as a person has changed them."""

import contextlib
import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cac_reward.exports.activitynet import read_activitynet, write_activitynet
from cac_reward.exports.base import EntryError, LabelledClip, findings_of, parts_of
from cac_reward.exports.coco import read_coco, write_coco
from cac_reward.exports.cvat import read_cvat, write_cvat
from cac_reward.exports.fiftyone import read_fiftyone, write_fiftyone
from cac_reward.exports.label_studio import labelling_page, read_label_studio, write_label_studio
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

FORMATS: dict[str, tuple[Callable, Callable]] = {
    "activitynet": (write_activitynet, read_activitynet),
    "coco": (write_coco, read_coco),
    "cvat": (lambda clips: write_cvat(clips[0]), lambda text: [read_cvat(text)]),
    "fiftyone": (write_fiftyone, read_fiftyone),
    "label_studio": (write_label_studio, read_label_studio),
}
EVERY = pytest.mark.parametrize("name", FORMATS)

MOVING = Finding(
    "jump",
    TimeWindow(0.5, 1.5),
    (Box(0.75, 0.1, 0.2, 0.3, 0.4), Box(1.0, 0.2, 0.2, 0.4, 0.4)),
    3,
    'it <jumps> & "lands"',
)
NOWHERE = Finding("flicker", TimeWindow(1.75, 2.0), (), 1)
CLIP = LabelledClip(
    path="clips/a & b.mp4", width=64, height=48, fps=8.0, num_frames=16, findings=(MOVING, NOWHERE)
)

shares = st.floats(0, 1, allow_nan=False)
lines = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)


@st.composite
def some_findings(draw: Any) -> Finding:
    start = draw(st.floats(0, 30))
    end = start + draw(st.floats(0.01, 30))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, x2 = sorted((draw(shares), draw(shares)))
        y1, y2 = sorted((draw(shares), draw(shares)))
        if x1 < x2 and y1 < y2:
            boxes.append(Box(draw(st.floats(start, end)), x1, y1, x2, y2))
    kind = draw(lines.filter(str.strip))
    return Finding(kind, TimeWindow(start, end), boxes, draw(st.integers(1, 3)), draw(lines))


some_clips = st.builds(
    LabelledClip,
    path=st.from_regex(r"[\w ./-]{1,20}", fullmatch=True),
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    fps=st.floats(0.5, 120),
    num_frames=st.integers(2, 300),
    findings=st.lists(some_findings(), max_size=3),
)


@EVERY
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(clips=st.lists(some_clips, min_size=1, max_size=2, unique_by=lambda clip: clip.path))
def test_every_format_gives_back_exactly_what_went_out(
    name: str, clips: list[LabelledClip]
) -> None:
    write, read = FORMATS[name]
    clips = clips[:1] if name == "cvat" else clips
    assert read(write(clips)) == clips


@EVERY
def test_no_clips_and_no_findings(name: str) -> None:
    write, read = FORMATS[name]
    empty = LabelledClip(path="a", width=2, height=2, fps=1.0, num_frames=2)
    assert read(write([empty])) == [empty]
    if name != "cvat":
        assert read(write([])) == []


def test_the_clip_of_a_record() -> None:
    report = AnomalyReport(score=0.1, judge_id="j", fps=8.0, num_frames=16, findings=CLIP.findings)
    record = ClipRecord(path=CLIP.path, width=64, height=48, report=report)
    assert LabelledClip.from_record(record) == CLIP
    with pytest.raises(ValueError, match="clip must have been readable to be exported, got b"):
        LabelledClip.from_record(ClipRecord(path="b", error="no"))


def test_a_box_that_moves_is_one_track_and_boxes_together_are_several() -> None:
    (moving, nowhere) = parts_of(CLIP)
    first, second = (0.1, 0.2, 0.3, 0.4), (0.2, 0.2, 0.4, 0.4)
    assert (moving.track.first, moving.track.stop) == (4, 12)
    # Held to both ends of its window, as the nearest box is.
    assert moving.track.keyframes == ((4, first), (6, first), (8, second), (11, second))
    assert nowhere.track.keyframes == ((14, (0, 0, 1, 1)), (15, (0, 0, 1, 1)))
    pair = Finding("merging", TimeWindow(0, 1), (Box(0.5, 0, 0, 0.5, 1), Box(0.5, 0.5, 0, 1, 1)))
    both = parts_of(LabelledClip(**{**vars(CLIP), "findings": (pair,)}))
    assert [part.track.keyframes[1] for part in both] == [(4, (0, 0, 0.5, 1)), (4, (0.5, 0, 1, 1))]


def test_activitynet_as_others_read_it() -> None:
    plain = json.loads(write_activitynet([CLIP]))
    entry = plain["database"]["clips/a & b.mp4"]
    assert (entry["duration"], entry["resolution"], entry["subset"]) == (2.0, "64x48", "validation")
    assert [(one["label"], one["segment"]) for one in entry["annotations"]] == [
        ("jump", [0.5, 1.5]),
        ("flicker", [1.75, 2.0]),
    ]
    del entry["num_frames"]
    entry["annotations"] = [{"label": "jump", "segment": [0.5, 1.5]}]
    (read,) = read_activitynet(json.dumps(plain))
    assert read.findings == (Finding("jump", TimeWindow(0.5, 1.5)),)
    assert read.num_frames == 16


def test_coco_as_others_read_it() -> None:
    plain = json.loads(write_coco([CLIP]))
    assert plain["categories"] == [{"id": 1, "name": "jump"}, {"id": 2, "name": "flicker"}]
    images = {one["id"]: one for one in plain["images"]}
    drawn = [
        (images[one["image_id"]]["frame_index"], one["category_id"], one["track_id"], one["bbox"])
        for one in plain["annotations"]
    ]
    assert [one[:3] for one in drawn] == [
        *((4, 1, 1), (6, 1, 1), (8, 1, 1), (11, 1, 1), (14, 2, 2), (15, 2, 2))
    ]
    assert drawn[0][3] == pytest.approx([6.4, 9.6, 12.8, 9.6])
    assert drawn[-1][3] == [0, 0, 64, 48]
    assert plain["annotations"][0]["area"] == pytest.approx(12.8 * 9.6)
    # What readers of COCO (datumaro among them) look for in every annotation.
    fields = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    assert all(fields <= set(one) for one in plain["annotations"])
    assert images[1]["file_name"] == "clips/a & b.mp4/000004.png"


def test_coco_is_indexed_by_pycocotools(tmp_path: Any) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    (tmp_path / "c.json").write_text(write_coco([CLIP]))
    index = coco.COCO(str(tmp_path / "c.json"))
    assert len(index.getAnnIds(catIds=index.getCatIds(catNms=["jump"]))) == 4


def test_cvat_as_cvat_reads_it() -> None:
    root = ElementTree.fromstring(write_cvat(CLIP))
    assert root.findtext("version") == "1.1"
    assert root.findtext("meta/task/size") == "16"
    assert root.findtext("meta/task/stop_frame") == "15"
    labels = [one.findtext("name") for one in root.iter("label")]
    assert labels == ["flicker", "jump"]
    moving, nowhere = root.iter("track")
    boxes = [(b.get("frame"), b.get("outside"), b.get("xtl"), b.get("ybr")) for b in moving]
    assert [(frame, outside) for frame, outside, _, _ in boxes] == [
        *(("4", "0"), ("6", "0"), ("8", "0"), ("11", "0"), ("12", "1"))
    ]
    assert [float(str(left)) for _, _, left, _ in boxes] == pytest.approx([6.4, 6.4, *[12.8] * 3])
    assert all(box.get("keyframe") == "1" and box.get("occluded") == "0" for box in moving)
    assert moving[0].findtext("attribute[@name='severity']") == "3"
    assert moving[0].findtext("attribute[@name='why']") == MOVING.why
    assert [box.get("frame") for box in nowhere] == ["14", "15"]


def as_cvat_writes_it(text: str) -> str:
    """Two decimals, frames between keyframes filled in, and nothing that CVAT does not know."""
    root = ElementTree.fromstring(text)
    meta = root.find("meta")
    assert meta is not None
    meta.remove(meta.find("cac"))  # type: ignore[arg-type]
    for track in root.iter("track"):
        for box in list(track):
            for side in ("xtl", "ytl", "xbr", "ybr"):
                box.set(side, f"{float(str(box.get(side))):.2f}")
            between = copy.deepcopy(box)
            between.set("keyframe", "0")
            between.set("frame", str(int(str(box.get("frame"))) + 1))
            if box.get("frame") == "4":
                track.insert(1, between)
    return ElementTree.tostring(root, encoding="unicode")


def test_tracks_in_another_order_give_the_findings_in_theirs() -> None:
    root = ElementTree.fromstring(write_cvat(CLIP))
    tracks = root.findall("track")
    for track in tracks:
        root.remove(track)
    root.extend(reversed(tracks))
    assert read_cvat(ElementTree.tostring(root, encoding="unicode")) == CLIP


@pytest.mark.parametrize(("pixels", "counts"), [(0.005, False), (0.02, True), (0.4, True)])
def test_a_hundredth_of_a_pixel_is_no_change(pixels: float, counts: bool) -> None:
    root = ElementTree.fromstring(write_cvat(CLIP))
    box = root.find("track/box")
    assert box is not None
    box.set("xtl", repr(float(box.get("xtl", "")) + pixels))
    found = read_cvat(ElementTree.tostring(root, encoding="unicode"))
    assert (found != CLIP) == counts


def test_a_box_is_drawn_on_the_frame_nearest_to_its_time() -> None:
    late = Finding("jump", TimeWindow(0.5, 1.5), (Box(0.74, 0, 0, 0.5, 1),))  # 5.92 frames of 8/s
    (part,) = parts_of(LabelledClip(**{**vars(CLIP), "findings": (late,)}))
    assert [frame for frame, _ in part.track.keyframes] == [4, 6, 11]


def test_a_file_that_cvat_has_written_anew_is_read_exactly() -> None:
    text = as_cvat_writes_it(write_cvat(CLIP))
    assert read_cvat(text, path=CLIP.path, fps=8.0) == CLIP
    with pytest.raises(
        ValueError, match="path must be given for a file that CVAT wrote, .*, got N"
    ):
        read_cvat(text)
    with pytest.raises(ValueError, match="fps must be given for a file that CVAT wrote"):
        read_cvat(text, path="a")


def test_what_a_person_changes_in_cvat_counts() -> None:
    text = write_cvat(CLIP)
    moved = text.replace('frame="8" keyframe="1" outside="0" occluded="0" xtl="12.8"', "?", 1)
    moved = moved.replace("?", 'frame="8" keyframe="1" outside="0" occluded="0" xtl="6.4"')
    finding = read_cvat(moved).findings[0]
    assert (finding.type, finding.severity, finding.why) == ("jump", 3, MOVING.why)
    assert finding.window == TimeWindow(0.5, 1.5)
    # What moves has a box on every frame, on the line between its keyframes.
    assert [box.time_seconds for box in finding.boxes] == [
        *(0.5, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375)
    ]
    assert finding.boxes[2].coordinates == pytest.approx((0.1, 0.2, 0.35, 0.4))
    assert finding.boxes[3].coordinates == pytest.approx((0.1, 0.2, 0.4, 0.4))
    renamed = read_cvat(text.replace('label="jump"', 'label="motion"')).findings[0]
    assert renamed == Finding("motion", MOVING.window, MOVING.boxes, 3, MOVING.why)
    root = ElementTree.fromstring(text)
    tracks = list(root.iter("track"))
    root.remove(tracks[0])
    for attribute in list(tracks[1].iter("attribute")):
        attribute.text = None
    tracks[1][0].set("xbr", "32.0")
    tracks[1].append(
        ElementTree.fromstring(
            '<box frame="15" keyframe="1" outside="1" xtl="0" ytl="0" xbr="9" ybr="9"/>'
        )
    )
    tracks[1].remove(tracks[1][1])
    (added,) = read_cvat(ElementTree.tostring(root, encoding="unicode")).findings
    assert added == Finding("flicker", TimeWindow(1.75, 1.875), (Box(1.75, 0, 0, 0.5, 1),))


def drawn_in_cvat(*shapes: str, root: str = "") -> str:
    """A track of these shapes in a file that CVAT wrote, and what is beside it."""
    return (
        "<annotations><meta><job><size>16</size><original_size><width>64</width><height>48</height>"
        "</original_size></job><source>film.mp4</source></meta>"
        f"<track id='0' label='jump'>{''.join(shapes)}</track>{root}</annotations>"
    )


def cvat_box(frame: int, left: float, *, key: int = 1, outside: int = 0, more: str = "") -> str:
    return (
        f"<box frame='{frame}' keyframe='{key}' outside='{outside}' xtl='{left}' ytl='0' "
        f"xbr='{left + 8}' ybr='24' {more}/>"
    )


def left_sides(*shapes: str) -> dict[float, float]:
    """Frame and left side in pixels of each box of the one finding."""
    (finding,) = read_cvat(drawn_in_cvat(*shapes), fps=8.0).findings
    return {box.time_seconds * 8: box.x1 * 64 for box in finding.boxes}


def test_what_cvat_shows_between_keyframes_is_kept() -> None:
    ends = cvat_box(2, 0), cvat_box(6, 32)
    assert left_sides(*ends) == {2: 0, 3: 8, 4: 16, 5: 24, 6: 32}
    # What CVAT has written counts more than the line.
    written = left_sides(*ends, cvat_box(4, 20, key=0))
    assert written == {2: 0, 3: 8, 4: 20, 5: 24, 6: 32}
    # Off the screen from frame 4 to 6.
    gap = [cvat_box(2, 0), cvat_box(4, 16, outside=1), cvat_box(6, 32)]
    assert left_sides(*gap) == {2: 0, 3: 8, 6: 32}
    # What stands still is held.
    still = [cvat_box(2, 0), *(cvat_box(frame, 0, key=0) for frame in (3, 4)), cvat_box(5, 0)]
    assert left_sides(*still) == {2: 0, 5: 0}


def test_cvats_own_name_of_a_video_is_taken() -> None:
    text = drawn_in_cvat(cvat_box(2, 0))
    assert read_cvat(text, fps=8.0).path == "film.mp4"
    assert read_cvat(text, path="a/b.mp4", fps=8.0).path == "a/b.mp4"
    ours = text.replace("<source>", "<cac path='c.mp4' fps='8'/><source>")
    assert read_cvat(ours).path == "c.mp4"


@pytest.mark.parametrize("shape", ["polygon", "polyline", "points"])
def test_the_box_around_a_shape_of_points(shape: str) -> None:
    drawn = f"<{shape} frame='4' keyframe='1' outside='0' points='16.0,12.0;32.0,0.0;24,36'/>"
    (finding,) = read_cvat(drawn_in_cvat(drawn), fps=8.0).findings
    assert [box.coordinates for box in finding.boxes] == [(0.25, 0.0, 0.5, 0.75)]


POINT = "<points frame='4' keyframe='1' outside='0' points='{}'/>"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            drawn_in_cvat("<ellipse frame='1' keyframe='1' cx='9' cy='9' rx='2' ry='2'/>"),
            r"shape must be one of box, polygon, .*, got ellipse \(line 1, column \d+",
        ),
        (drawn_in_cvat("<mask frame='1' keyframe='1' rle='3'/>"), "got mask .* draw a box in its"),
        (drawn_in_cvat("<mask frame='1' keyframe='0' rle='3'/>"), "got mask"),
        (drawn_in_cvat("<skeleton frame='1' keyframe='1'/>"), "got skeleton"),
        (
            drawn_in_cvat(POINT.format("1,2;x,3")),
            r"points of points .* must be x,y;x,y, got '1,2;x",
        ),
        (drawn_in_cvat(POINT.format("1,2")), "points .* must have an area, got '1,2'; draw a box"),
        (drawn_in_cvat(cvat_box(1, 2, more="rotation='30.5'")), "upright, got rotation 30.5"),
        (
            drawn_in_cvat(root="<image id='0'><polygon points='1,2;3,4'/></image>"),
            r"image \(line 1, column \d+\) must be a track, got another entry; export the task as",
        ),
    ],
)
def test_what_cvat_draws_otherwise_is_refused_by_name(text: str, match: str) -> None:
    with pytest.raises(EntryError, match=match) as caught:
        read_cvat(text, fps=8.0)
    assert caught.value.line == 1


@EVERY
def test_a_changed_label_or_reason_keeps_times_and_boxes_exact(name: str) -> None:
    write, read = FORMATS[name]
    odd = Finding("jump", TimeWindow(0.501, 1.4999), (Box(0.7534, 0.1, 0.2, 1 / 3, 0.4),), 3, "old")
    clip = LabelledClip(**{**vars(CLIP), "findings": (odd,)})
    text = write([clip])
    # Only what the tool shows is changed, not the note.
    note = re.compile(r'("note": "(?:[^"\\]|\\.)*"|<attribute name="cac_note">[^<]*<)')
    shown = [
        part if at % 2 else part.replace("jump", "force").replace("old", "young")
        for at, part in enumerate(note.split(text))
    ]
    assert (len(shown) > 1) == (name != "activitynet")
    (read_back,) = read("".join(shown))
    assert read_back.findings == (Finding("force", odd.window, odd.boxes, 3, "young"),)


def test_a_moved_box_counts_in_every_json() -> None:
    plain = json.loads(write_coco([CLIP]))
    plain["annotations"][2]["bbox"][0] = 6.4
    finding = read_coco(json.dumps(plain))[0].findings[0]
    assert finding.boxes[2].coordinates == pytest.approx((0.1, 0.2, 0.3, 0.4))
    tasks = json.loads(write_label_studio([CLIP]))
    region = tasks[0]["predictions"][0]["result"][0]
    assert [one["frame"] for one in region["value"]["sequence"]] == [5, 7, 9, 12]
    assert [one["enabled"] for one in region["value"]["sequence"]] == [True, True, True, False]
    assert region["value"]["sequence"][2]["x"] == pytest.approx(20)
    region["value"]["sequence"][2]["x"] = 10
    tasks[0]["annotations"] = [{"result": []}, {"result": [region, {"type": "choices"}]}]
    (finding,) = read_label_studio(json.dumps(tasks))[0].findings
    assert finding.boxes[2].coordinates == pytest.approx((0.1, 0.2, 0.3, 0.4))
    samples = json.loads(write_fiftyone([CLIP]))
    assert samples[0]["findings"]["detections"][0]["support"] == [5, 12]
    assert sorted(map(int, samples[0]["frames"])) == list(range(5, 13))
    box = samples[0]["frames"]["5"]["findings"]["detections"][0]["bounding_box"]
    assert box == pytest.approx([0.1, 0.2, 0.2, 0.2])
    box[0] = 0.0
    samples[0]["frames"]["16"] = {
        "findings": {"detections": [{"label": "text", "bounding_box": [0, 0, 0.5, 2]}]}
    }
    first, second, third = read_fiftyone(json.dumps(samples))[0].findings
    # Eight frames, and frame 7 lies as near to the first box as to the second.
    assert len(first.boxes) == 9
    assert first.boxes[0].coordinates == pytest.approx((0.0, 0.2, 0.2, 0.4))
    assert second == NOWHERE
    assert third == Finding("text", TimeWindow(1.875, 2.0), (Box(1.875, 0, 0, 0.5, 1),))


def test_a_coco_box_without_a_track_is_a_finding_of_one_frame() -> None:
    plain = json.loads(write_coco([CLIP]))
    plain["annotations"] = plain["annotations"][2:3]
    del plain["annotations"][0]["track_id"]
    (finding,) = read_coco(json.dumps(plain))[0].findings
    assert (finding.type, finding.window) == ("jump", TimeWindow(1.0, 1.125))
    (box,) = finding.boxes
    assert box.time_seconds == 1.0
    assert box.coordinates == pytest.approx((0.2, 0.2, 0.4, 0.4))


def test_the_labelling_page_names_the_types() -> None:
    root = ElementTree.fromstring(labelling_page([CLIP]))
    assert [one.get("value") for one in root.iter("Label")] == ["flicker", "jump"]
    video, box, labels = root
    assert (video.tag, video.get("frameRate")) == ("Video", "8")
    assert {box.get("toName"), labels.get("toName")} == {"video"}
    assert (box.get("name"), labels.get("name")) == ("box", "type")


def test_parts_of_one_finding_must_agree() -> None:
    pair = Finding("merging", TimeWindow(0, 1), (Box(0.5, 0, 0, 0.5, 1), Box(0.5, 0.5, 0, 1, 1)))
    clip = LabelledClip(**{**vars(CLIP), "findings": (pair,)})
    text = write_cvat(clip).replace('label="merging"', 'label="splitting"', 1)
    with pytest.raises(
        ValueError, match="tracks of one finding must say the same, got 'splitting'"
    ):
        read_cvat(text)
    parts = parts_of(clip)
    assert findings_of(parts[::-1], clip) == (pair,)


NO_ENTRIES = '{"videos": [], "images": [], "categories": [], "annotations": []}'


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_cvat, "", "CVAT file must be XML, got ''"),
        (read_cvat, "<!DOCTYPE a><a/>", "CVAT file must have no document type, got one"),
        (read_cvat, "<a><meta><cac path='a' fps='8'/></meta></a>", "state the video's width as a"),
        (
            read_cvat,
            write_cvat(CLIP).replace(' frame="4"', ""),
            r"box \(line \d+, column 5\) must have the attribute 'frame'",
        ),
        (
            read_cvat,
            write_cvat(CLIP).replace('xtl="6.4', 'xtl="six'),
            r"xtl of box \(line \d+, column 5\) must be a number, got 'six",
        ),
        (
            read_cvat,
            write_cvat(CLIP).replace('"severity">3', '"severity">bad'),
            r"severity of track \(line \d+, column 3\) must be a number, got 'bad'",
        ),
        (read_cvat, write_cvat(CLIP).replace("{&quot;", "{").replace('{"', "{"), "note must be as"),
        (read_activitynet, "{}", "ActivityNet file must be an object with 'database', got"),
        (read_activitynet, '{"database": []}', "ActivityNet file must have the documented form"),
        (read_activitynet, '{"database": {"a": {"resolution": "2"}}}', "must be WIDTHxHEIGHT, got"),
        (read_coco, "[]", "COCO file must be an object with 'videos', got list"),
        (read_coco, '{"videos": 3}', "videos must be a list, got int"),
        (
            read_coco,
            NO_ENTRIES.replace("[", "[{}", 1),
            "entry of videos must be an object with 'id'",
        ),
        (
            read_coco,
            write_coco([CLIP]).replace('"id": 2', '"id": 1'),
            "must have different ids, go",
        ),
        (
            read_coco,
            write_coco([CLIP]).replace('"image_id": 1,', '"image_id": 9,'),
            "image_id must be in its table, got 9",
        ),
        (
            read_coco,
            re.sub(r'"bbox": \[[^]]*\]', '"bbox": [1]', write_coco([CLIP])),
            r"bbox of annotation 1 must be 4 numbers, got \[1\]",
        ),
        (read_label_studio, "{}", "Label Studio file must be a list of tasks, got dict"),
        (read_label_studio, "[{}]", "task must be an object with 'data'"),
        (
            read_label_studio,
            write_label_studio([CLIP]).replace('"rotation": 0', '"rotation": 5'),
            "rectangles of .* must be upright, got rotation 5; draw",
        ),
        (
            read_label_studio,
            re.sub(r'"labels": \[[^]]*\]', '"labels": []', write_label_studio([CLIP])),
            "must have a sequence and a label",
        ),
        (
            read_label_studio,
            write_label_studio([CLIP]).replace('"frame": 5', '"frame": "5"'),
            "sequence of .* must hold numbers",
        ),
        (read_fiftyone, "{}", "FiftyOne file must be a list of samples, got dict"),
        (read_fiftyone, '[{"filepath": "a"}]', "sample a must be an object with 'metadata'"),
        (
            read_fiftyone,
            re.sub(r'"support": \[[^]]*\]', '"support": [1]', write_fiftyone([CLIP])),
            r"box or support must be 2 numbers, got \[1\]",
        ),
        (
            read_fiftyone,
            re.sub(r'"detections": \[', '"detections": [3, ', write_fiftyone([CLIP])),
            "detections of .* must be a list of objects",
        ),
    ],
)
def test_files_of_another_form_are_refused(read: Callable, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    "changes", [{"width": 0}, {"height": 1.5}, {"num_frames": True}, {"fps": float("nan")}]
)
def test_a_clip_checks_itself(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} of .* must be a number above 0, got "):
        LabelledClip(**{**vars(CLIP), **changes})
    with pytest.raises(ValueError, match="path must name a file, got ''"):
        LabelledClip(**{**vars(CLIP), "path": ""})


def test_two_clips_of_one_path_are_no_activitynet() -> None:
    with pytest.raises(ValueError, match="clips must have different paths, got one twice"):
        write_activitynet([CLIP, CLIP])


SCRAPS = ('"', "{", "[", "]", "null", "-1", "1e999", "9" * 30, "true", "<", ">", "0", "", "\x00")


@EVERY
def test_damaged_files_are_refused_or_read_and_nothing_else(name: str) -> None:
    write, read = FORMATS[name]
    text = write([CLIP])
    dice = random.Random(0)
    outcomes = set()
    for _ in range(300):
        damaged = text
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(damaged))
            damaged = damaged[:at] + dice.choice(SCRAPS) + damaged[at + dice.randint(0, 6) :]
        try:
            outcomes.add(isinstance(read(damaged), list))
        except ValueError:
            outcomes.add(False)
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "cvat"])
def test_json_with_entries_of_other_kinds_is_refused_or_read(name: str) -> None:
    write, read = FORMATS[name]
    text = write([CLIP])
    others: list[Any] = [None, True, -1, 0, 1e300, "x", [], {}, [[]], "9" * 400]

    def spots(plain: Any) -> list[tuple[Any, Any]]:
        keys = plain if isinstance(plain, dict) else range(len(plain))
        found = [(plain, key) for key in keys]
        inner = [plain[key] for key in keys if isinstance(plain[key], dict | list)]
        return found + [one for part in inner for one in spots(part)]

    count = len(spots(json.loads(text)))
    for number in range(0, count, max(1, count // 60)):
        for other in others:
            plain = json.loads(text)
            owner, key = spots(plain)[number]
            owner[key] = other
            with contextlib.suppress(ValueError):
                assert isinstance(read(json.dumps(plain)), list)


@EVERY
@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"a": "\ud800"', "<annotations>\ud800</annotations>"]
)
def test_what_is_of_no_format_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match="file must be text of its format, got|file must be XML"):
        FORMATS[name][1](text)


@EVERY
def test_an_error_about_a_long_entry_stays_short(name: str) -> None:
    write, read = FORMATS[name]
    long = write([CLIP]).replace("jump", "x" * 9000)
    with pytest.raises(
        ValueError, match="type must have at most 64 characters|note must be"
    ) as one:
        read(long)
    assert type(one.value) in (ValueError, EntryError)
    assert len(str(one.value)) < 1000
