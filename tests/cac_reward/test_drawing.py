"""What a person sees: outlines in the right frames, pictures that open, a page that is safe."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward.drawing import (
    COLOURS,
    draw_findings,
    fit_for_display,
    picture_uri,
    report_page,
    video_uri,
    write_page,
)
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
from cac_reward.video import Video

HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>&amp;"


def grey(num_frames: int = 8, height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.full((num_frames, 3, height, width), 100, dtype=torch.uint8)


def colour(number: int) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(COLOURS[number][1:])), dtype=torch.uint8)


def hostile_report(**changes: Any) -> AnomalyReport:
    values: dict[str, Any] = {
        "score": 0.25,
        "judge_id": HOSTILE,
        "fps": 8.0,
        "num_frames": 8,
        "findings": (
            Finding("x<b>", TimeWindow(0.25, 0.5), (Box(0.25, 0.1, 0.1, 0.5, 0.5),), 3, HOSTILE),
            Finding("camera", TimeWindow(0.5, 2.0)),
        ),
        "windows": (TimeWindow(0.0, 0.75),),
        "inspect_frames": tuple(range(8)),
        "scan_text": HOSTILE,
        "judge_text": HOSTILE,
        "prompt": HOSTILE,
        "timings": {HOSTILE: 1.0},
        "note": HOSTILE,
    }
    return AnomalyReport(**{**values, **changes})


class Page(HTMLParser):
    """Tags and texts of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_boxes_are_outlined_in_their_window_only() -> None:
    finding = Finding("flicker", TimeWindow(0.25, 0.5), (Box(0.25, 0.2, 0.25, 0.6, 0.75),))
    frames = grey()
    drawn = draw_findings(frames, [finding], 8.0)
    changed = (drawn != frames).any(1)
    assert changed.flatten(1).any(1).tolist() == [False, False, True, True] + [False] * 4
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[5:15, 6:18] = True
    expected[6:14, 7:17] = False
    assert torch.equal(changed[2], expected)
    assert torch.equal(drawn[2, :, 5, 6], colour(0))
    assert torch.equal(frames, grey())


def test_a_finding_without_boxes_outlines_the_frame_in_its_own_colour() -> None:
    first = Finding("flicker", TimeWindow(0, 0.125), (Box(0, 0.4, 0.4, 0.6, 0.6),))
    second = Finding("camera", TimeWindow(0, 0.125))
    drawn = draw_findings(grey(), [first, second], 8.0)
    for corner in ((0, 0), (19, 29), (0, 29), (19, 0)):
        assert torch.equal(drawn[0, :, corner[0], corner[1]], colour(1))
    assert torch.equal(drawn[0, :, 8, 12], colour(0))
    assert torch.equal(drawn[1], grey()[1])


@pytest.mark.parametrize("box", [(0.999, 0.999, 1, 1), (0, 0, 1e-6, 1e-6), (0, 0.5, 1, 0.5001)])
def test_the_smallest_boxes_stay_in_the_frame(box: tuple[float, ...]) -> None:
    finding = Finding("text", TimeWindow(0, 1), (Box(0, *box),))
    drawn = draw_findings(grey(), [finding], 8.0)
    assert (drawn != grey()).any(1).flatten(1).any(1).all()


def test_only_whole_uint8_clips_are_drawn_on() -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[frames, 3, height, width\], got"):
        draw_findings(torch.rand(2, 3, 8, 8), [], 8.0)


def test_a_picture_is_a_png_that_others_read() -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    frame = (torch.rand(3, 11, 17) * 255).to(torch.uint8)
    kind, _, data = picture_uri(frame).partition(",")
    assert kind == "data:image/png;base64"
    with image.open(io.BytesIO(base64.b64decode(data))) as opened:
        opened.load()
        assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", (17, 11))
        pixels = torch.tensor(list(opened.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.reshape(11, 17, 3).permute(2, 0, 1), frame)
    with pytest.raises(ValueError, match=r"frame must be uint8 \[3, height, width\], got"):
        picture_uri(torch.rand(3, 4, 4))


@pytest.mark.parametrize(("size", "stored"), [((20, 30), (20, 30)), ((21, 31), (22, 32))])
def test_a_clip_of_any_size_becomes_an_mp4(size: tuple, stored: tuple) -> None:
    kind, _, data = video_uri(Video(grey(4, *size), 8.0)).partition(",")
    assert kind == "data:video/mp4;base64"
    read = Video.decode(io.BytesIO(base64.b64decode(data)))
    assert ((read.height, read.width), read.num_frames, read.fps) == (stored, 4, 8.0)
    assert (read.frames.float() - 100).abs().max() < 4


def test_clips_are_brought_to_a_size_to_look_at() -> None:
    tiny = Video((torch.rand(2, 3, 32, 32) * 255).to(torch.uint8), 8.0)
    grown = fit_for_display(tiny)
    assert (grown.height, grown.width) == (192, 192)
    assert torch.equal(grown.frames[..., ::6, ::6], tiny.frames)
    assert torch.equal(grown.frames[..., 5::6, 5::6], tiny.frames)
    large = fit_for_display(Video(grey(2, 752, 1360), 8.0))
    assert (large.height, large.width) == (265, 480)
    assert large.frames.unique().tolist() == [100]
    for size in ((192, 300), (100, 480), (480, 480)):
        clip = Video(grey(2, *size), 8.0)
        assert fit_for_display(clip) is clip


def test_no_text_becomes_markup() -> None:
    page = Page(report_page([hostile_report()], [Video(grey(), 8.0, HOSTILE)], HOSTILE))
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "b", "iframe", "object", "link", "form"}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not any(name.startswith("on") for name in attributes)
    assert sum("<script>alert('1')</script>" in text for text in page.texts) == 9
    sources = [attrs["src"] or "" for _, attrs in page.tags if "src" in attrs]
    assert sources
    assert all(re.match(r"data:(image/png|video/mp4);base64,", one) for one in sources)


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    text = report_page([hostile_report()], [Video(grey(), 8.0)])
    policies = [a["content"] for t, a in Page(text).tags if t == "meta" and "http-equiv" in a]
    assert policies == [
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    ]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text


def test_the_page_shows_verdict_windows_and_findings() -> None:
    text = report_page([hostile_report(prompt="a cat")], [Video(grey(), 8.0, "clip.mp4")])
    page = Page(text)
    assert "P(clean) 0.250" in page.texts
    assert "anomalous" in page.texts
    assert "0.25 to 0.50 s" in page.texts
    bars = [a["style"] for t, a in page.tags if t == "i"]
    assert bars[0] == "left:0.00%;width:75.00%"
    assert bars[1] == f"left:25.00%;width:25.00%;background:{COLOURS[0]}"
    assert bars[2] == f"left:50.00%;width:50.00%;background:{COLOURS[1]}"
    assert sum(tag == "img" for tag, _ in page.tags) == 8


def test_a_clip_that_could_not_be_judged_says_why() -> None:
    failed = hostile_report(
        score=None, error="tool call: must be JSON", findings=(), windows=(), note=None
    )
    page = Page(report_page([failed], [Video(grey(), 8.0)]))
    assert "tool call: must be JSON" in page.texts
    assert "not judged" in page.texts
    assert not any(tag in ("table", "i") for tag, _ in page.tags)


def test_many_frames_are_thinned() -> None:
    report = hostile_report(num_frames=100, inspect_frames=tuple(range(100)), findings=())
    page = Page(report_page([report], [Video(grey(100), 8.0)]))
    assert 8 <= sum(tag == "img" for tag, _ in page.tags) <= 12


def test_several_reports_share_a_page_written_to_a_file(tmp_path: Path) -> None:
    reports, videos = [hostile_report(), hostile_report()], [Video(grey(), 8.0)] * 2
    write_page(tmp_path / "page.html", reports, videos, "caf\u00e9")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == report_page(reports, videos, "caf\u00e9")
    assert text.count("<article>") == 2


def test_reports_and_clips_must_go_together() -> None:
    with pytest.raises(ValueError, match="videos must be one for each of 1 reports, got 0"):
        report_page([hostile_report()], [])
    with pytest.raises(ValueError, match="video of a report must have its 8 frames, got 7 in x"):
        report_page([hostile_report()], [Video(grey(7), 8.0, "x")])
