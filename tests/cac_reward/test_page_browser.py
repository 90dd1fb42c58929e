"""The evidence page in a real browser: it plays, seeks, filters, and its boxes are in place."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cac_reward.page import write_page
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
from cac_reward.video import Video
from tests.browser import Browser, find_browser

pytest.importorskip("PIL.Image", reason="pillow is not installed")
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no chromium here; on Debian: apt install chromium"
)

FPS, NUM_FRAMES, WIDTH, HEIGHT, SIDE = 8.0, 16, 64, 48, 16
VIDEO = "document.querySelector('#clip-0 video')"
SETTLED = f"!{VIDEO}.seeking && {VIDEO}.paused && document.querySelector('#clip-0').dataset.frame"
RED, AMBER = (0xE6, 0x19, 0x4B), (0xFF, 0xB0, 0x00)


def square(frame: int) -> tuple[int, int, int, int]:
    """Where the white square is, in pixels: it goes right and down."""
    return (3 * frame, frame, 3 * frame + SIDE, frame + SIDE)


def relative(frame: int) -> Box:
    x1, y1, x2, y2 = square(frame)
    return Box(frame / FPS, x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT)


def report(score: float, *findings: Finding) -> AnomalyReport:
    return AnomalyReport(
        score=score, judge_id="j", fps=FPS, num_frames=NUM_FRAMES, findings=findings, prompt="a box"
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ClipRecord]:
    path = tmp_path_factory.mktemp("clips") / "a #1.mp4"
    frames = torch.full((NUM_FRAMES, 3, HEIGHT, WIDTH), 60, dtype=torch.uint8)
    for frame in range(NUM_FRAMES):
        x1, y1, x2, y2 = square(frame)
        frames[frame, :, y1:y2, x1:x2] = 255
    Video(frames, FPS).save(path)
    jump = Finding("jump", TimeWindow(0.5, 1.5), tuple(map(relative, range(4, 12))), 3, "gone")
    flicker = Finding("flicker", TimeWindow(1.75, 2.0), (), 1, "<b>blinks</b>")
    reports = [report(0.1, jump, flicker), report(0.9), report(0.4, flicker)]
    found = [ClipRecord(path=str(path), width=64, height=48, report=one) for one in reports]
    return [*found, ClipRecord(path="bad.mp4", error="zero bytes")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(params=["embed", "link"])
def page(
    request: pytest.FixtureRequest, browser: Browser, records: list[ClipRecord], tmp_path: Path
) -> Browser:
    write_page(tmp_path / "page.html", records, videos=request.param)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait(f"{VIDEO}.readyState >= 2")
    return browser


def extent(picture: np.ndarray, colour: tuple[int, int, int]) -> list[int] | None:
    """Left, top, right and bottom of what has about this colour, None where nothing has."""
    near = (np.abs(picture.astype(int) - colour) < 40).all(2)
    if not near.any():
        return None
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def shown(page: Browser) -> list[int]:
    """Numbers of the clips that are shown, from top to bottom."""
    ids = page.evaluate(
        "[...document.querySelectorAll('article')].filter(one => !one.hidden).map(one => one.id)"
    )
    return [int(one.removeprefix("clip-")) for one in ids]


def choose(page: Browser, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const one = document.querySelector('form').{name}; one.value = '{value}';"
        "one.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_a_click_on_a_finding_shows_its_box_where_the_fault_is(page: Browser) -> None:
    picture = page.picture("#clip-0 .stage")
    assert extent(picture, RED) is None
    page.click("#clip-0 li button")
    page.wait(f"{SETTLED} === '4'")
    picture = page.picture("#clip-0 .stage")
    scale = picture.shape[1] / WIDTH
    assert scale > 4
    # The stage has round corners, and the paper behind them is white too.
    white, red = extent(picture[8:-8, 8:-8], (255, 255, 255)), extent(picture, RED)
    assert white is not None
    assert red is not None
    expected = [scale * side for side in square(4)]
    # The frame is what the file shows there (its edges are soft), and the outline goes around it.
    np.testing.assert_array_less(np.abs(np.add(white, 8) - expected), 1.5 * scale)
    label = 17
    np.testing.assert_array_less(np.abs(np.subtract(red[2:], expected[2:])), 3)
    assert abs(red[0] - expected[0]) < 3
    assert abs(red[1] - (expected[1] + 2)) < 3 or abs(red[1] - (expected[1] - label)) < 3
    page.click("#clip-0 li button", row=1)
    page.wait(f"{SETTLED} === '14'")
    picture = page.picture("#clip-0 .stage")
    assert extent(picture, RED) is None
    around = extent(picture, AMBER)
    assert around is not None
    height, width = picture.shape[:2]
    np.testing.assert_array_less(np.abs(np.subtract(around, [0, 0, width, height])), 3)


def test_boxes_follow_frame_by_frame(page: Browser) -> None:
    page.click("#clip-0 li button")
    page.wait(f"{SETTLED} === '4'")
    for frame in (5, 6, 7):
        page.click("#clip-0 button[data-step='1']")
        page.wait(f"{SETTLED} === '{frame}'")
        picture = page.picture("#clip-0 .stage")
        red = extent(picture, RED)
        assert red is not None
        assert abs(red[2] - square(frame)[2] * picture.shape[1] / WIDTH) < 3
    page.click("#clip-0 button[data-step='-1']")
    page.wait(f"{SETTLED} === '6'")


def test_a_click_on_the_timeline_goes_there(page: Browser) -> None:
    page.click("#clip-0 .row", across=0.3, row=1)
    page.wait(f"{SETTLED} === '4'")
    page.click("#clip-0 .timeline i")  # The bar of the first finding, in its middle.
    page.wait(f"{SETTLED} === '4'")
    at = page.evaluate("document.querySelector('#clip-0 .now-at').textContent")
    assert at == "0.50 s, frame 4"
    head = page.evaluate("document.querySelector('#clip-0 .head').style.left")
    assert head == f"{100 * 4.5 / 16}%"


def test_it_plays_and_the_play_head_goes_along(page: Browser) -> None:
    page.evaluate(
        "(() => { window.seen = new Set(); new MutationObserver(() => "
        "seen.add(document.querySelector('#clip-0').dataset.frame)).observe("
        "document.querySelector('#clip-0'), {attributes: true}); })()"
    )
    page.click("#clip-0 button[data-play]")
    page.wait("seen.size >= 6")
    assert page.evaluate(f"!{VIDEO}.paused")
    assert page.evaluate("document.querySelector('#clip-0 [data-play]').textContent") == "pause"
    page.click("#clip-0 video")
    page.wait(f"{VIDEO}.paused")


def test_filters_and_order(page: Browser) -> None:
    assert shown(page) == [0, 1, 2, 3]
    options = page.evaluate("[...document.querySelector('form').type.options].map(o => o.text)")
    assert options == ["any", "flicker (2)", "jump (1)"]
    for name, value, expected in (
        ("type", "jump", [0]),
        ("type", "flicker", [0, 2]),
        ("verdict", "clean", [1]),
        ("verdict", "unjudged", [3]),
        ("low", "0.4", [1, 2]),
        ("high", "0.4", [0, 2]),
        ("words", "BLINKS", [0, 2]),
        ("words", "zero", [3]),
        ("order", "worst", [0, 2, 1, 3]),
        ("order", "best", [1, 2, 0, 3]),
    ):
        choose(page, name, value)
        assert (name, value, shown(page)) == (name, value, expected)
        count = page.evaluate("document.querySelector('form').shown.value")
        assert count == f"{len(expected)} of 4 clips"
        choose(page, name, "")
    assert shown(page) == [0, 1, 2, 3]
    choose(page, "type", "jump")
    page.click("form button[type=reset]")
    page.wait("document.querySelector('form').shown.value === '4 of 4 clips'")


def test_nothing_is_fetched_and_nothing_goes_wrong(page: Browser) -> None:
    page.click("#clip-0 li button")
    page.wait(f"{SETTLED} === '4'")
    assert [one for one in page.requests if not one.startswith(("file:", "data:"))] == []
    assert page.complaints == []


def test_a_foreign_script_does_not_run(page: Browser) -> None:
    page.evaluate(
        "(() => { const one = document.createElement('script');"
        "one.textContent = 'window.hacked = true'; document.body.append(one); })()"
    )
    assert page.evaluate("window.hacked === undefined")
    page.complaints.clear()


def test_a_clip_that_is_gone_is_named(
    browser: Browser, records: list[ClipRecord], tmp_path: Path
) -> None:
    gone = ClipRecord(
        path=str(tmp_path / "gone.mp4"), width=64, height=48, report=records[0].report
    )
    write_page(tmp_path / "page.html", [gone], videos="link")
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait("!document.querySelector('.trouble').hidden")
    text = browser.evaluate("document.querySelector('.trouble').textContent")
    assert text == f"The browser cannot play this file: {tmp_path / 'gone.mp4'}"
