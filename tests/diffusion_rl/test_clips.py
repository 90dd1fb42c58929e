"""Clips on the page: boxes where the judge put them, a time line that agrees with the picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import av
import numpy
import pytest
import torch
from PIL import Image, ImageSequence

from diffusion_rl import clips
from diffusion_rl.clips import AMBER, GREY, RED, STRIP, Clip, Mark, data_uri, draw_clip, judged_clip

REPORT = {
    "score": 0.07,
    "windows": [[0.25, 1.25]],
    "findings": [
        {
            "type": "vanish",
            "window": [0.5, 1.0],
            "boxes": [
                {"time": 0.5, "box": [0.25, 0.125, 0.5, 0.75]},
                {"time": 0.75, "box": [0.5, 0.5, 0.75, 0.75]},
            ],
            "severity": 2,
            "why": "the circle is gone",
        }
    ],
}


def black(frames: int = 13, size: int = 32) -> torch.Tensor:
    return torch.zeros(frames, 3, size, size)


def is_colour(pixels: torch.Tensor, colour) -> torch.Tensor:
    """Which pixels [... 3 H W] have this colour."""
    wanted = torch.tensor(colour).reshape(3, 1, 1)
    return (pixels - wanted).abs().amax(dim=-3) < 1e-6


def test_a_report_becomes_marks_and_windows():
    clip = judged_clip(black(), 8.0, REPORT, note="oracle: vanish")
    assert clip.score == 0.07
    assert clip.windows == ((0.25, 1.25),)
    (mark,) = clip.marks
    assert (mark.type, mark.window, mark.why) == ("vanish", (0.5, 1.0), "the circle is gone")
    assert mark.boxes_at(0.6) == [(0.25, 0.125, 0.5, 0.75)]
    assert mark.boxes_at(0.9) == [(0.5, 0.5, 0.75, 0.75)]


def test_an_object_that_gives_a_dict_is_read_alike():
    @dataclass
    class Report:
        def to_dict(self):
            return REPORT

    assert judged_clip(black(), 8.0, Report()).marks == judged_clip(black(), 8.0, REPORT).marks


def test_without_a_report_nothing_is_marked():
    for report in (None, {}, {"score": None, "findings": [], "windows": []}):
        clip = judged_clip(black(), 8.0, report)
        assert (clip.score, clip.marks, clip.windows) == (None, (), ())


def test_boxes_are_drawn_in_their_window_only_and_where_they_belong():
    drawn = draw_clip(judged_clip(black(), 8.0, REPORT))
    picture = is_colour(drawn[:, :, :192], RED)
    assert [index for index in range(13) if picture[index].any()] == [4, 5, 6, 7]  # 0.5 to 1.0 s
    rows, columns = picture[4].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 143, 48, 95)
    assert not picture[4, 60:84, 60:84].any()  # an outline, not a patch
    rows, _ = picture[6].nonzero().unbind(1)
    assert rows.min() == 96  # from 0.75 s on the other box


def test_a_mark_without_boxes_leaves_the_picture_alone():
    clip = Clip(black(), 8.0, marks=(Mark("flicker", (0.0, 1.0)),))
    drawn = draw_clip(clip)
    assert drawn[:, :, :192].eq(0).all()
    assert is_colour(drawn[:, :, 194:], RED).any()


def test_the_time_line_shows_windows_faults_and_the_present():
    drawn = draw_clip(judged_clip(black(16), 8.0, REPORT))  # two seconds, 192 columns
    edge = drawn[0, :, -1:]  # lowest row: no play head
    colours = {"grey": GREY, "amber": AMBER, "red": RED}
    spans = {
        name: is_colour(edge, colour)[0].nonzero().flatten() for name, colour in colours.items()
    }
    assert spans["red"].tolist() == list(range(48, 96))
    assert spans["amber"].tolist() == [*range(24, 48), *range(96, 120)]
    assert len(spans["grey"]) == 192 - 96
    head = drawn[:, :, 194 + STRIP // 2].amin(dim=1) == 1.0
    assert [int(row.nonzero().min()) for row in head] == [12 * index for index in range(16)]


def test_small_clips_grow_by_whole_pixels_and_large_ones_stay():
    video = torch.rand(2, 3, 32, 48)
    drawn = draw_clip(Clip(video, 8.0))
    assert drawn.shape == (2, 3, 192 + 14, 288)
    assert torch.equal(drawn[:, :, :192:6, ::6], video)
    large = torch.rand(2, 3, 201, 301)
    drawn = draw_clip(Clip(large, 8.0))
    assert drawn.shape == (2, 3, 216, 302)
    assert torch.equal(drawn[:, :, :201, :301], large)


def test_boxes_and_windows_beyond_the_clip_are_cut():
    marks = (Mark("deform", (0.0, 9.0), ((0.0, (0.9, 0.9, 1.0, 1.0)), (0.0, (0.0, 0.0, 0.01, 1)))),)
    drawn = draw_clip(Clip(black(3), 8.0, marks=marks, windows=((0.3, 7.0),)))
    assert drawn.shape == (3, 3, 206, 192)
    assert is_colour(drawn[:, :, -1:], RED).all()


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.split(",", 1)[1])


def test_a_small_clip_is_a_lossless_webp():
    video = (torch.rand(5, 3, 16, 16) * 255).round() / 255
    uri = data_uri(video, 8.0)
    assert uri.startswith("data:image/webp;base64,")
    image = Image.open(io.BytesIO(decoded(uri)))
    frames = [numpy.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    expected = (video * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert numpy.array_equal(numpy.stack(frames), expected)
    assert image.info["loop"] == 0


def test_a_large_clip_is_an_mp4(monkeypatch):
    monkeypatch.setattr(clips, "MAX_WEBP_PIXELS", 100)
    uri = data_uri(torch.rand(5, 3, 16, 16), 8.0)
    assert uri.startswith("data:video/mp4;base64,")
    with av.open(io.BytesIO(decoded(uri))) as container:
        assert len(list(container.decode(video=0))) == 5


def test_what_is_no_mapping_is_written_below() -> None:
    assert judged_clip(black(), 8.0, "could not decode").note == "could not decode"
    assert judged_clip(black(), 8.0, ["dark"], note="seed 3").note == "['dark']; seed 3"
    assert judged_clip(black(), 8.0, "dark").marks == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(torch.zeros(3, 32, 32), 8.0), "video has shape .* need 4 axes, not 3"),
        (lambda: Clip(torch.zeros(3, 1, 32, 32), 8.0), "3 channels and at least one frame"),
        (lambda: Clip(torch.zeros(0, 3, 32, 32), 8.0), "3 channels and at least one frame"),
        (lambda: Clip(black(), 0.0), "fps must be above 0, got 0.0"),
        (
            lambda: judged_clip(black(), 8.0, {"findings": [{"type": "vanish"}]}),
            "report must hold findings with type, window and boxes, got",
        ),
        (
            lambda: judged_clip(black(), 8.0, {"windows": [[1.0]]}),
            "report must hold findings with type, window and boxes, got",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
