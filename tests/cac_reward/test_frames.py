"""Which frames each turn sees, their sizes, the judge's settings file and the blame maps."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from cac_reward.frames import (
    InspectSettings,
    JudgeSettings,
    ScanSettings,
    blame_map,
    blame_maps,
    budget_size,
    frame_times,
    inspect_indices,
    resize_to_budget,
    scan_indices,
)
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

RATES = st.sampled_from([8.0, 12.0, 16.0, 23.976, 24.0, 29.97, 30.0])


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), RATES, st.floats(0.5, 60), st.integers(2, 40))
def test_the_scan_covers_the_clip(count: int, fps: float, scan_fps: float, most: int) -> None:
    chosen = scan_indices(count, fps, ScanSettings(fps=scan_fps, max_frames=most))
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= most
    assert chosen[0] == 0
    assert chosen[-1] < count
    if scan_fps >= fps and most >= count:
        assert chosen == list(range(count))
    gap = max(1.0, fps / scan_fps)
    assert count - chosen[-1] <= gap + 1
    if len(chosen) < most:
        steps = [b - a for a, b in zip(chosen, chosen[1:])]
        assert all(abs(step - gap) <= 1 for step in steps)


def test_the_scan_of_a_toy_clip_and_of_a_real_one() -> None:
    assert scan_indices(13, 8.0, ScanSettings(fps=8.0, max_frames=16)) == list(range(13))
    assert scan_indices(13, 8.0, ScanSettings(fps=8.0, max_frames=4)) == [0, 4, 8, 12]
    half_seconds = scan_indices(126, 24.0, ScanSettings(fps=2.0))
    assert frame_times(half_seconds, 24.0) == [i / 2 for i in range(11)]


def test_the_second_look_shows_the_windows_with_their_margins() -> None:
    dense = InspectSettings(fps=8.0, max_frames=12, margin_seconds=0.25)
    for first, stop in product(range(13), range(1, 14)):
        if first < stop:
            window = TimeWindow(float(f"{first / 8:.2f}"), float(f"{stop / 8:.2f}"))
            expected = list(range(max(0, first - 2), min(13, stop + 2)))
            if len(expected) > 12:
                expected = [round(i * 12 / 11) for i in range(12)]
            assert inspect_indices([window], 13, 8.0, dense) == expected


def test_touching_windows_are_shown_once() -> None:
    narrow = InspectSettings(fps=8.0, margin_seconds=0.0)
    windows = [TimeWindow(1.0, 1.5), TimeWindow(0.25, 0.5), TimeWindow(0.375, 0.75)]
    assert inspect_indices(windows, 13, 8.0, narrow) == [2, 3, 4, 5, 8, 9, 10, 11]
    sparse = InspectSettings(fps=4.0, margin_seconds=0.0)
    assert inspect_indices(windows, 13, 8.0, sparse) == [2, 4, 8, 10]
    thin = InspectSettings(fps=8.0, margin_seconds=0.0, max_frames=3)
    assert inspect_indices(windows, 13, 8.0, thin) == [2, 8, 11]


def test_a_window_between_two_frames_shows_the_nearest() -> None:
    narrow = InspectSettings(fps=8.0, margin_seconds=0.0)
    assert inspect_indices([TimeWindow(0.05, 0.09)], 13, 8.0, narrow) == [0]
    assert inspect_indices([TimeWindow(1.6, 1.62)], 13, 8.0, narrow) == [12]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 4), st.floats(0.01, 3)), min_size=1, max_size=4),
    st.integers(2, 40),
)
def test_the_second_look_is_sorted_bounded_and_inside(spans: list, most: int) -> None:
    windows = [TimeWindow(start, start + length) for start, length in spans]
    chosen = inspect_indices(windows, 120, 24.0, InspectSettings(max_frames=most))
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= most
    wide = [(w.start_seconds - 0.26, w.end_seconds + 0.26) for w in windows]
    assert all(any(low <= i / 24 < high for low, high in wide) for i in chosen)


def test_clips_and_windows_that_cannot_be_shown_are_refused() -> None:
    window = [TimeWindow(0.0, 1.0)]
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"a clip must have at least 2 frames, got {count}"):
            scan_indices(count, 8.0, ScanSettings())
        with pytest.raises(ValueError, match=f"a clip must have at least 2 frames, got {count}"):
            inspect_indices(window, count, 8.0, InspectSettings())
    for fps in (0, -1.0, math.nan, math.inf, None):
        with pytest.raises(ValueError, match="fps must be above 0, got"):
            scan_indices(13, fps, ScanSettings())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="windows must hold at least one window to inspect"):
        inspect_indices([], 13, 8.0, InspectSettings())
    late = [TimeWindow(2.0, 3.0)]
    with pytest.raises(
        ValueError, match=r"begin before the clip's end at 1.62 s, got \[2.0, 3.0\]"
    ):
        inspect_indices(late, 13, 8.0, InspectSettings())


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 500_000), st.sampled_from([1, 8, 32])
)
def test_a_size_is_the_largest_that_keeps_budget_grid_and_aspect(
    height: int, width: int, pixels: int, factor: int
) -> None:
    rows, columns = (side // factor for side in budget_size(height, width, pixels, factor))
    assert budget_size(height, width, pixels, factor) == (rows * factor, columns * factor)
    assert min(rows, columns) >= 1
    cells = max(1, pixels // factor**2)
    assert rows * columns <= cells
    ideal = math.sqrt(cells * height / width)
    if 1 <= ideal <= cells:
        assert abs(rows - ideal) <= 1
        assert abs(columns - cells / ideal) <= max(2.0, cells / ideal / ideal + 1)


def test_sizes_of_known_clips() -> None:
    assert budget_size(32, 32, 2304, 8) == (48, 48)
    assert budget_size(32, 32, 576, 8) == (24, 24)
    assert budget_size(32, 32, 1024, 8) == (32, 32)
    assert budget_size(32, 32, 1, 8) == (8, 8)
    assert budget_size(752, 1360, 65536, 32) == (192, 320)
    with pytest.raises(ValueError, match="factor must be at least 1, got"):
        budget_size(32, 32, 1024, 0)


def test_resized_frames_are_pictures_a_png_can_carry() -> None:
    frames = torch.rand(3, 3, 32, 32)
    small = resize_to_budget(frames, 576, 8)
    plain = interpolate(frames, (24, 24), mode="bilinear", antialias=True)
    assert small.shape == (3, 3, 24, 24)
    torch.testing.assert_close(small, (plain * 255).round() / 255)
    assert torch.equal((small * 255).round() / 255, small)
    same = resize_to_budget(frames, 1024, 8)
    assert torch.equal(same, (frames * 255).round() / 255)
    assert torch.equal(resize_to_budget(same, 1024, 8), same)
    grown = resize_to_budget(torch.full((1, 3, 8, 8), 0.5), 1024, 8)
    assert grown.shape == (1, 3, 32, 32)
    assert grown.unique().tolist() == [pytest.approx(128 / 255)]
    with pytest.raises(ValueError, match=r"frames must be in \[0, 1\], got min=-1.00"):
        resize_to_budget(frames * 2 - 1, 576, 8)


def test_real_judges_have_real_defaults(tmp_path: Path) -> None:
    plain = JudgeSettings.load(tmp_path)
    assert plain == JudgeSettings()
    assert (plain.wording, plain.domain) == ("full", None)
    assert plain.inspect.fps > plain.scan.fps
    assert plain.inspect.pixels > plain.scan.pixels


TOY = {
    "schema_version": 1,
    "wording": "brief",
    "domain": "toy_world",
    "scan": {"fps": 8.0, "max_frames": 16, "pixels": 1024},
    "inspect": {"fps": 8.0, "max_frames": 12, "pixels": 2304, "margin_seconds": 0.25},
}


def test_settings_live_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "cac_judge.json").write_text(json.dumps(TOY), encoding="utf-8")
    loaded = JudgeSettings.load(tmp_path)
    assert loaded.domain == "toy_world"
    assert loaded.scan == ScanSettings(fps=8.0, max_frames=16, pixels=1024)
    assert loaded.inspect.margin_seconds == 0.25
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert JudgeSettings.load(tmp_path / "again") == loaded
    assert json.loads((tmp_path / "again" / "cac_judge.json").read_text()) == TOY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, r"cac_judge.json: schema_version must be 1, got 2"),
        ({"scann": {}}, "judge settings must have no key but .*, got 'scann'"),
        ({"scan": {"fp": 1}}, "scan must have no key but .*, got 'fp'"),
        ({"scan": []}, r"scan must be an object, got \[\]"),
        ({"wording": "short"}, "wording must be one of .*, got 'short'"),
        ({"domain": ""}, "domain must be a name or null, got ''"),
        ({"scan": {"fps": 0}}, "scan.fps must be above 0, got 0"),
        ({"scan": {"fps": "8"}}, "scan.fps must be above 0, got '8'"),
        ({"scan": {"max_frames": 1}}, "scan.max_frames must be an integer of at least 2, got 1"),
        ({"inspect": {"pixels": 0.5}}, "inspect.pixels must be an integer of at least 1, got 0.5"),
        ({"inspect": {"fps": True}}, "inspect.fps must be above 0, got True"),
        ({"inspect": {"margin_seconds": -1}}, "inspect.margin_seconds must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "cac_judge.json").write_text(json.dumps({**TOY, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        JudgeSettings.load(tmp_path)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe\x00", b""])
def test_a_damaged_settings_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cac_judge.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"cac_judge\.json must be JSON, got b.*: \w"):
        JudgeSettings.load(tmp_path)


def blame_by_hand(findings: list[Finding], shape: tuple[int, int, int], p: float) -> torch.Tensor:
    """The definition, pixel by pixel; every box of these tests lies on the pixel grid."""
    blame = torch.zeros(shape)
    for f, y, x in product(*map(range, shape)):
        for finding in findings:
            if not finding.window.start_seconds <= f / 8 < finding.window.end_seconds:
                continue
            middle_x, middle_y = (x + 0.5) / shape[2], (y + 0.5) / shape[1]
            near = min((abs(b.time_seconds - f / 8) for b in finding.boxes), default=0)
            inside = not finding.boxes or any(
                b.x1 < middle_x < b.x2 and b.y1 < middle_y < b.y2
                for b in finding.boxes
                if abs(b.time_seconds - f / 8) == near
            )
            if inside:
                blame[f, y, x] = max(float(blame[f, y, x]), p * finding.severity / 3)
    return blame


def test_blame_equals_its_definition_pixel_by_pixel() -> None:
    boxes = (Box(0.25, 0.25, 0.0, 0.5, 0.5), Box(0.75, 0.5, 0.5, 1.0, 1.0))
    findings = [
        Finding("flicker", TimeWindow(0.25, 0.875), boxes, severity=3),
        Finding("camera", TimeWindow(0.75, 1.0), (), severity=1),
        Finding("text", TimeWindow(0.5, 5.0), (Box(1.0, 0.0, 0.0, 1.0, 0.25),), severity=2),
    ]
    drawn = blame_map(findings, 9, 4, 8, 8.0, 0.9)
    torch.testing.assert_close(drawn, blame_by_hand(findings, (9, 4, 8), 0.9))
    assert drawn.unique().numel() == 4
    assert drawn.max() == pytest.approx(0.9)


def test_a_small_box_still_marks_a_pixel() -> None:
    tiny = Finding("text", TimeWindow(0, 1), (Box(0, 0.501, 0.501, 0.502, 0.502),), severity=3)
    assert blame_map([tiny], 8, 4, 4, 8.0, 1.0).sum() == 8


def test_nothing_found_is_nothing_blamed() -> None:
    assert not blame_map([], 3, 4, 5, 8.0, 1.0).any()
    assert blame_map([], 3, 4, 5, 8.0, 1.0).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"p_anomalous must be in \[0, 1\], got nan"):
        blame_map([], 3, 4, 5, 8.0, math.nan)


@pytest.mark.parametrize(
    ("size", "small"), [((4, 8), (4, 8)), ((96, 200), (62, 128)), ((1, 1000), (1, 128))]
)
def test_blame_of_reports_is_drawn_small_and_only_where_there_is_a_score(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    finding = Finding("flicker", TimeWindow(0.25, 0.5), (Box(0.25, 0, 0, 0.5, 1),), severity=3)
    facts = {"judge_id": "x", "fps": 8.0, "num_frames": 6, "findings": (finding,)}
    judged = AnomalyReport(score=0.25, **facts)
    failed = AnomalyReport(score=None, error="no answer", **facts)
    drawn = blame_maps([failed, judged, None], 6, *size, 8.0)
    expected = torch.zeros(3, 6, *small)
    expected[1, 2:4, :, : small[1] // 2] = 0.75
    torch.testing.assert_close(drawn, expected)
    assert blame_maps([], 6, *size, 8.0).shape == (0, 6, *small)
