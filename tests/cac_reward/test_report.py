"""Windows, boxes, findings and reports: what they refuse, and that JSON loses nothing."""

import copy
import hashlib
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=40)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def windows(draw: Any) -> TimeWindow:
    start = draw(st.floats(0, 100))
    return TimeWindow(start, start + draw(st.floats(0.001, 50)))


@st.composite
def spans(draw: Any) -> tuple[float, float]:
    low = draw(st.floats(0, 0.99))
    return low, draw(st.floats(low, 1, exclude_min=True))


@st.composite
def findings(draw: Any) -> Finding:
    window = draw(windows())
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        time = draw(st.floats(window.start_seconds, window.end_seconds))
        (x1, x2), (y1, y2) = draw(spans()), draw(spans())
        boxes.append(Box(time, x1, y1, x2, y2))
    kind = draw(LINE.filter(str.strip))
    return Finding(kind, window, tuple(boxes), draw(st.sampled_from((1, 2, 3))), draw(LINE))


@st.composite
def reports(draw: Any) -> AnomalyReport:
    num_frames = draw(st.integers(1, 50))
    judged = draw(st.booleans())
    index = st.integers(0, num_frames - 1)
    return AnomalyReport(
        score=draw(st.floats(0, 1)) if judged else None,
        error=None if judged else draw(TEXT),
        judge_id=draw(TEXT),
        fps=draw(st.floats(0.1, 240)),
        num_frames=num_frames,
        findings=draw(st.lists(findings(), max_size=3)),
        windows=draw(st.lists(windows(), max_size=3)),
        scan_frames=draw(st.lists(index, max_size=4)),
        inspect_frames=draw(st.lists(index, max_size=4)),
        scan_text=draw(TEXT),
        judge_text=draw(st.none() | TEXT),
        prompt=draw(TEXT),
        timings=draw(st.dictionaries(TEXT, st.floats(0, 100), max_size=2)),
        tokens=draw(st.none() | st.dictionaries(TEXT, st.integers(0, 10**9), max_size=2)),
        note=draw(st.none() | TEXT),
    )


def small_report(**changes: Any) -> AnomalyReport:
    values: dict[str, Any] = {"score": 0.25, "judge_id": "toy", "fps": 8.0, "num_frames": 13}
    return AnomalyReport(**{**values, **changes})


@settings(max_examples=60, deadline=None)
@given(reports())
def test_a_report_survives_json_and_pickle(report: AnomalyReport) -> None:
    assert AnomalyReport.from_json(report.to_json()) == report
    assert pickle.loads(pickle.dumps(report)) == report
    assert copy.deepcopy(report) == report


@settings(max_examples=60, deadline=None)
@given(windows(), st.integers(2, 60), st.sampled_from([8.0, 15.0, 16.0, 24.0, 29.97, 30.0]))
def test_a_window_covers_the_frames_shown_in_it(window: TimeWindow, count: int, fps: float) -> None:
    covered = list(window.frame_indices(count, fps))
    tolerance = 0.006
    expected = [
        f
        for f in range(count)
        if window.start_seconds - tolerance <= f / fps < window.end_seconds - tolerance
    ]
    # Where f / fps falls on the edge to the last bit, either is right.
    edges = (window.start_seconds - tolerance, window.end_seconds - tolerance)
    differing = set(covered) ^ set(expected)
    assert all(min(abs(f / fps - edge) for edge in edges) < 1e-9 for f in differing)


@pytest.mark.parametrize("fps", [8.0, 12.0, 15.0, 16.0, 24.0, 25.0, 30.0, 50.0, 60.0])
def test_a_window_written_with_two_decimals_covers_the_frames_it_was_made_of(fps: float) -> None:
    for first in range(40):
        for stop in range(first + 1, 41):
            window = TimeWindow(float(f"{first / fps:.2f}"), float(f"{stop / fps:.2f}"))
            assert window.frame_indices(41, fps) == range(first, stop)


@pytest.mark.parametrize(
    ("start", "end"), [(1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (math.nan, 1.0), (0.0, math.inf)]
)
def test_a_window_must_have_a_length(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"must have 0 <= start < end|must be finite"):
        TimeWindow(start, end)


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 10**400])
def test_a_time_must_be_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"start_seconds must be (a number|finite), got"):
        TimeWindow(value, 1e9)


@pytest.mark.parametrize(
    "coordinates", [(0.5, 0, 0.5, 1), (0, 0, 1.1, 1), (-0.1, 0, 1, 1), (0, 0.6, 1, 0.5)]
)
def test_a_box_must_lie_in_the_frame(coordinates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"box must have 0 <= x1 < x2 <= 1 .* relative to"):
        Box(0.0, *coordinates)


def test_a_box_must_have_a_time_in_the_clip() -> None:
    with pytest.raises(ValueError, match="time must be at least 0 seconds, got -1"):
        Box(-1.0, 0, 0, 1, 1)


def test_a_finding_refuses_what_is_not_one() -> None:
    window = TimeWindow(0.0, 1.0)
    with pytest.raises(ValueError, match="severity must be one of .*, got 4"):
        Finding("flicker", window, severity=4)
    with pytest.raises(ValueError, match="severity must be an integer, got True"):
        Finding("flicker", window, severity=True)
    with pytest.raises(ValueError, match="type must name the kind of fault, got ' '"):
        Finding(" ", window)
    with pytest.raises(ValueError, match="type must have at most 64 characters, got 65"):
        Finding("x" * 65, window)
    with pytest.raises(ValueError, match="why must be one printable line"):
        Finding("flicker", window, why="two\nlines")
    with pytest.raises(ValueError, match="why must be one printable line"):
        Finding("flicker", window, why="lone \ud800 surrogate")
    with pytest.raises(ValueError, match="window must be a TimeWindow, got"):
        Finding("flicker", (0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="boxes must hold Box objects, got"):
        Finding("flicker", window, ((0, 0, 1, 1),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="box time must be inside its window"):
        Finding("flicker", window, (Box(1.5, 0, 0, 1, 1),))


def test_between_its_boxes_a_finding_keeps_the_nearest() -> None:
    first, twin, last = Box(0.0, 0, 0, 1, 1), Box(0.0, 0, 0, 0.5, 1), Box(1.0, 0, 0, 1, 0.5)
    finding = Finding("flicker", TimeWindow(0, 1), (first, twin, last))
    assert finding.boxes_at(0.25) == (first, twin)
    assert finding.boxes_at(0.75) == (last,)
    assert Finding("flicker", TimeWindow(0, 1)).boxes_at(0.5) == ()


def test_the_verdict_follows_the_score() -> None:
    assert small_report(score=0.5).verdict == "clean"
    assert small_report(score=0.49).verdict == "anomalous"
    failed = small_report(score=None, error="rubbish")
    assert failed.verdict is None
    assert math.isnan(failed.reward)
    assert small_report(score=0.5).reward == 0.5
    assert small_report().duration_seconds == 13 / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": 1.5}, r"score must be in \[0, 1\], got 1.5"),
        ({"score": math.nan}, "score must be finite, got nan"),
        ({"score": None}, "score must be None exactly where error says why"),
        ({"error": "rubbish"}, "score must be None exactly where error says why"),
        ({"fps": 0}, "fps must be above 0, got 0"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": 2.0}, "num_frames must be an integer, got 2.0"),
        ({"scan_frames": (13,)}, r"scan_frames must be in \[0, 13\), got 13"),
        ({"inspect_frames": (-1,)}, r"inspect_frames must be in \[0, 13\), got -1"),
    ],
)
def test_a_report_refuses_what_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_report(**changes)


FINDING = {"type": "text", "window": [0, 1], "boxes": [], "severity": 1, "why": ""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 5}, "schema_version must be 1 to 4, got 5; read this report with"),
        ({"schema_version": True}, "schema_version must be 1 to 4, got True"),
        ({"schema_version": "1"}, "schema_version must be 1 to 4, got '1'"),
        ({"tokens": []}, r"tokens must be an object, got \[\]"),
        ({"tokens": {"scan.read": 0.5}}, "tokens must be an integer, got 0.5"),
        ({"tokens": {"scan.read": -1}}, "tokens must be counts from 0 on, got -1 for 'scan.read'"),
        ({"settings": {"scan.fps": [2]}}, r"settings must hold numbers and texts, got \[2\] for"),
        ({"settings": {"scan.fps": math.inf}}, "settings must hold numbers and texts, got inf for"),
        ({"settings": 3}, "settings must be"),
        (
            {"score": [[0, 1]] * 900, "error": "x"},
            "score must be None exactly .*got score=.{1,99}$",
        ),
        ({"settings": {"x" * 5000: []}}, r"settings must .* for 'x{1,40}\.\.\.x{1,40}'$"),
        ({"schema_version": 1}, "report must have no key but .*, got 'prompt_sha256'"),
        ({"prompt_sha256": "0"}, "prompt_sha256 must be the hash of the prompt, [0-9a-f]{64}, got"),
        ({"prompt_sha256": None}, "prompt_sha256 must be the hash of the prompt"),
        ({"decoder": None}, "decoder must be text, got None"),
        ({"revision": 1}, "revision must be text, got 1"),
        ({"verdict": "clean"}, "verdict must agree with score 0.25, got 'clean'"),
        ({"extra": 1}, "report must have no key but .*, got 'extra'"),
        ({"prompt": 3}, "prompt must be text, got 3"),
        ({"windows": {}}, "windows must be a list, got"),
        ({"windows": [[0.0]]}, "window must hold 2 numbers, got 1"),
        ({"timings": []}, "timings must be an object, got"),
        ({"scan_frames": [1.5]}, "scan_frames must be an integer, got 1.5"),
        ({"findings": [{}]}, "finding must have 'type', got only"),
        ({"findings": [FINDING | {"boxes": [{"time": 0}]}]}, "box must have 'box', got only"),
        ({"findings": [FINDING | {"boxes": [{"time": 0, "box": 0}]}]}, "box must be a list, got"),
        ({"findings": [FINDING | {"severity": "1"}]}, "severity must be an integer, got '1'"),
    ],
)
def test_a_stored_report_is_checked(changes: dict[str, Any], message: str) -> None:
    stored = json.loads(small_report().to_json())
    assert AnomalyReport.from_dict(stored) == small_report()
    with pytest.raises(ValueError, match=message):
        AnomalyReport.from_dict({**stored, **changes})


def test_reports_of_older_schemas_are_read() -> None:
    stored = small_report(settings={"scan.fps": 2.0}, tokens={"scan.read": 3}).to_dict()
    del stored["tokens"]
    found = AnomalyReport.from_dict({**stored, "schema_version": 3})
    assert found == small_report(settings={"scan.fps": 2.0}, tokens=None)
    del stored["settings"]
    found = AnomalyReport.from_dict({**stored, "schema_version": 2})
    assert found == small_report(settings=None)
    for name in ("revision", "decoder", "attention", "prompt_sha256"):
        del stored[name]
    with pytest.raises(ValueError, match="report must have "):
        AnomalyReport.from_dict({**stored, "schema_version": 2})
    found = AnomalyReport.from_dict({**stored, "schema_version": 1})
    assert found == small_report(decoder="not recorded")
    assert found.to_dict()["schema_version"] == 4
    with pytest.raises(ValueError, match="report must have "):
        AnomalyReport.from_dict(stored)


def test_how_the_judge_ran_and_the_prompts_hash_are_kept() -> None:
    report = small_report(
        revision="abc",
        decoder="8 votes",
        attention="sdpa",
        prompt="a cup \ud800",
        settings={"family": "qwen3_vl", "quantization": None, "scan.fps": 2.0},
    )
    assert AnomalyReport.from_json(report.to_json()) == report
    digest = hashlib.sha256(b"a cup").hexdigest()
    assert small_report(prompt="a cup").to_dict()["prompt_sha256"] == digest


def test_a_stored_report_must_be_whole() -> None:
    stored = small_report().to_dict()
    del stored["judge_text"]
    with pytest.raises(ValueError, match="report must have 'judge_text'"):
        AnomalyReport.from_dict(stored)
    with pytest.raises(ValueError, match=r"report must be an object, got \[\]"):
        AnomalyReport.from_json("[]")
    with pytest.raises(ValueError, match="Expecting value"):
        AnomalyReport.from_json("no JSON")
